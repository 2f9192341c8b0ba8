"""Gradient accumulation, optimizers and learning-rate schedules."""
