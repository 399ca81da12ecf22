"""The files of a run on disk: folder, identity, provenance and metrics. Imports no torch."""
