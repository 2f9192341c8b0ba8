"""Learning rate schedules: pure functions of the step, and of what validation has shown.

A schedule of your own is a subclass of `Schedule`, named `package.module:Class` in the recipe.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from distrain.errors import UserError
from distrain.fields import Choice, result


@dataclass(frozen=True)
class Stall:
    """What a schedule has seen of validation: integers alone, the same on all ranks."""

    best: int = -1
    """The most right validation samples after any epoch."""
    epochs: int = 0
    """Epochs since then, or since the last drop."""
    drops: tuple[int, ...] = ()
    """The steps from which on the rate was lower."""


@dataclass(frozen=True)
class Position:
    """Where in the run a step is."""

    step: int
    """From 0."""
    steps_per_epoch: int
    fraction: float
    """Share of the steps after the warm-up that are done, from 0, below 1."""
    drops: Sequence[int]
    """The steps from which on a schedule that follows validation was lower."""


class Schedule(Choice):
    """The learning rate over the run."""

    follows_validation: ClassVar[bool] = False
    """Whether the rate depends on validation, so that there has to be a validation set."""
    by_factors: ClassVar[bool] = False
    """Whether the rate changes by factors, so that it is drawn on a logarithmic axis."""

    lr: float = result(gt=0)
    """Learning rate after the warm-up, a step on the mean gradient of the global batch. [result]"""
    warmup_epochs: float = result(0.0, ge=0)
    """Epochs in which the rate rises linearly to `lr` (Goyal et al. 2017, section 2.2). [result]"""

    @abstractmethod
    def factor_at(self, at: Position) -> float:
        """What `lr` is multiplied by at a step after the warm-up: finite and above 0."""

    def observe(self, before: Stall, done: int, right: int) -> Stall:
        """What is known after one more evaluation, of a schedule that follows validation.

        Args:
            before: what was known.
            done: steps done so far, at the end of an epoch.
            right: validation samples whose highest logit is their label's.
        """
        return before

    def rate(
        self, step: int, steps_per_epoch: int, steps: int, drops: Sequence[int] = ()
    ) -> float:
        """The learning rate of the run's step number `step` (from 0) of `steps`; `drops` are those of its `Stall`.

        Raises:
            UserError: it is 0, negative or not finite.
        """
        warmup = round(self.warmup_epochs * steps_per_epoch)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        fraction = (step - warmup) / max(1, steps - warmup)
        rate = self.lr * self.factor_at(
            Position(step, steps_per_epoch, fraction, drops)
        )
        if not 0 < rate < math.inf:
            raise UserError(
                f"schedule {self.name} has a rate of {rate} at step {step}: it must be finite and above 0"
            )
        return rate

    def reason(self) -> str:
        """Why a schedule that follows validation has lowered the rate."""
        return "validation has stalled"


class Constant(Schedule, name="constant"):
    """One learning rate for the whole run."""

    def factor_at(self, at: Position) -> float:
        """Always 1."""
        return 1.0


class Step(Schedule, name="step"):
    """A learning rate that drops by a factor at given epochs."""

    by_factors = True

    drop_epochs: tuple[int, ...] = result(strict=False)
    """Epochs (from 0, the warm-up counted) at whose start the rate drops. [result]"""
    factor: float = result(0.1, gt=0, le=1)
    """What each drop multiplies the rate by. [result]"""

    def factor_at(self, at: Position) -> float:
        """A power of the factor."""
        return self.factor ** sum(
            at.step >= epoch * at.steps_per_epoch for epoch in self.drop_epochs
        )


class Plateau(Schedule, name="plateau"):
    """A learning rate that drops when the validation error stops improving (Krizhevsky et al. 2012, section 5)."""

    follows_validation = True

    patience: int = result(3, ge=1)
    """Epochs without more right validation samples than ever before, after which the rate drops. [result]"""
    drops: int = result(3, ge=1)
    """How often at most. [result]"""
    factor: float = result(0.1, gt=0, lt=1)
    """What each drop multiplies the rate by. [result]"""

    def factor_at(self, at: Position) -> float:
        """A power of the factor."""
        return float(self.factor ** sum(at.step >= drop for drop in at.drops))

    def reason(self) -> str:
        """For how long nothing improved."""
        return f"validation has stalled for {self.patience} epoch{'s' * (self.patience > 1)}"

    def observe(self, before: Stall, done: int, right: int) -> Stall:
        """Count an epoch, and drop when there were enough of them."""
        if right > before.best:
            return Stall(right, 0, before.drops)
        epochs = before.epochs + 1
        if epochs < self.patience or len(before.drops) == self.drops:
            return Stall(before.best, epochs, before.drops)
        return Stall(before.best, 0, (*before.drops, done))


class Polynomial(Schedule, name="polynomial"):
    """lr (1 - t)^power, with t from 0 to 1 over the steps after the warm-up."""

    power: float = result(1.0, gt=0)
    """1: linear; 2: as LARS's authors trained (You et al. 2017). [result]"""

    def factor_at(self, at: Position) -> float:
        """A power of the share that is left."""
        return float((1 - at.fraction) ** self.power)


class Cosine(Schedule, name="cosine"):
    """Half a cosine from lr to 0 over the steps after the warm-up (Loshchilov and Hutter 2017)."""

    def factor_at(self, at: Position) -> float:
        """From 1 to 0."""
        return (1 + math.cos(math.pi * at.fraction)) / 2


class Geometric(Schedule, name="geometric"):
    """Equal drops after equal times, over the steps after the warm-up (the best of Krizhevsky's own diary)."""

    by_factors = True

    drops: int = result(3, ge=1)
    """How often the rate drops: the run has one level more. [result]"""
    total: float = result(250.0, gt=1)
    """lr over the last level's rate. [result]"""

    def factor_at(self, at: Position) -> float:
        """A power of the drop."""
        level = int(at.fraction * (self.drops + 1))
        return float(self.total ** (-level / self.drops))
