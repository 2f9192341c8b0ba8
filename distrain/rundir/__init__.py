"""Run directory: names of its files, checkpoints, and the lease."""
