"""What a run learns: criterion and metrics. One file per task."""
