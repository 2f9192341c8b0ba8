"""Progress, metrics and health of a run: measured, logged and published."""
