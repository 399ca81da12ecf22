"""Tasks: criterion and metrics. One file per task."""
