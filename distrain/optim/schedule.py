"""The learning rate at each step: pure functions of the step, and for plateau of the steps at which it dropped."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distrain.sections import Constant, Cosine, Plateau, Polynomial, Schedule, Step


@dataclass(frozen=True)
class Stall:
    """What the plateau schedule has seen of validation: integers alone, the same on all ranks."""

    best: int = -1
    """The most right validation samples after any epoch."""
    epochs: int = 0
    """Epochs since then, or since the last drop."""
    drops: tuple[int, ...] = ()
    """The steps from which on the rate was lower."""


def observe(schedule: Plateau, before: Stall, done: int, right: int) -> Stall:
    """What is known after one more evaluation.

    Args:
        schedule: when to drop.
        before: what was known.
        done: steps done so far, at the end of an epoch.
        right: validation samples whose highest logit is their label's.
    """
    if right > before.best:
        return Stall(right, 0, before.drops)
    epochs = before.epochs + 1
    if epochs < schedule.patience or len(before.drops) == schedule.drops:
        return Stall(before.best, epochs, before.drops)
    return Stall(before.best, 0, (*before.drops, done))


def learning_rate(
    schedule: Schedule, step: int, steps_per_epoch: int, steps: int, plateau_drops: Sequence[int] = ()
) -> float:
    """The learning rate of the run's step number `step` (from 0) of `steps`.

    `plateau_drops`: the steps from which on the plateau schedule was lower; of no other use.
    """
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return schedule.lr * (step + 1) / warmup
    if isinstance(schedule, Constant):
        return schedule.lr
    if isinstance(schedule, Step):
        drops = sum(step >= epoch * steps_per_epoch for epoch in schedule.drop_epochs)
        return schedule.lr * schedule.factor**drops
    if isinstance(schedule, Plateau):
        return float(schedule.lr * schedule.factor ** sum(step >= drop for drop in plateau_drops))
    t = (step - warmup) / max(1, steps - warmup)  # from 0, below 1
    if isinstance(schedule, Polynomial):
        return float(schedule.lr * (1 - t) ** schedule.power)
    if isinstance(schedule, Cosine):
        return schedule.lr * (1 + math.cos(math.pi * t)) / 2
    level = int(t * (schedule.drops + 1))
    return float(schedule.lr * schedule.total ** (-level / schedule.drops))
