"""What a person runs to see whether an installation is sound."""
