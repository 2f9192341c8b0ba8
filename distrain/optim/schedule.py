"""The learning rate at each step: pure functions of the step."""

import math

from distrain.sections import Constant, Cosine, Polynomial, Schedule, Step


def learning_rate(schedule: Schedule, step: int, steps_per_epoch: int, steps: int) -> float:
    """The learning rate of the run's step number `step` (from 0) of `steps`."""
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return schedule.lr * (step + 1) / warmup
    if isinstance(schedule, Constant):
        return schedule.lr
    if isinstance(schedule, Step):
        drops = sum(step >= epoch * steps_per_epoch for epoch in schedule.drop_epochs)
        return schedule.lr * schedule.factor**drops
    t = (step - warmup) / max(1, steps - warmup)  # from 0, below 1
    if isinstance(schedule, Polynomial):
        return float(schedule.lr * (1 - t) ** schedule.power)
    if isinstance(schedule, Cosine):
        return schedule.lr * (1 + math.cos(math.pi * t)) / 2
    level = int(t * (schedule.drops + 1))
    return float(schedule.lr * schedule.total ** (-level / schedule.drops))
