"""The learning rate at each step: pure functions of the step."""

from distrain.config import Schedule


def learning_rate(schedule: Schedule, step: int, steps_per_epoch: int) -> float:
    """The learning rate of the run's step number `step` (from 0)."""
    if schedule.name == "constant":
        return schedule.lr
    # step: one drop by `factor` at the start of each epoch listed
    drops = sum(step >= epoch * steps_per_epoch for epoch in schedule.drop_epochs)
    return schedule.lr * schedule.factor**drops
