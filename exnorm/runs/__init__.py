"""What a run leaves on disk: its folder, identity, provenance and metrics. No torch here."""
