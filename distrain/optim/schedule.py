"""Learning rate schedules: pure functions of the step, and of what validation has shown.

A schedule of your own is a subclass of `Schedule`, named `package.module:Class` in the recipe.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from distrain.errors import UserError
from distrain.fields import Choice, result_field


@dataclass(frozen=True)
class PlateauState:
    """What a schedule has seen of validation: integers alone, the same on all ranks."""

    best: int = -1
    """The most right validation samples after any epoch."""
    epochs: int = 0
    """Epochs since then, or since the last drop."""
    drops: tuple[int, ...] = ()
    """The steps from which on the rate was lower."""


@dataclass(frozen=True)
class SchedulePosition:
    """Where in the run a step is."""

    step: int
    """From 0."""
    steps_per_epoch: int
    decay_fraction: float
    """Share of the steps after the warm-up that are done, from 0, below 1."""
    drop_steps: Sequence[int]
    """The steps from which on a schedule that follows validation was lower."""


class Schedule(Choice):
    """The learning rate over the run."""

    follows_validation: ClassVar[bool] = False
    """Whether the rate depends on validation, so that there has to be a validation set."""
    is_multiplicative: ClassVar[bool] = False
    """Whether the rate changes by factors, so that it is drawn on a logarithmic axis."""

    lr: float = result_field(gt=0)
    """Learning rate after the warm-up, a step on the mean gradient of the global batch. [result]"""
    warmup_epochs: float = result_field(0.0, ge=0)
    """Epochs in which the rate rises linearly to `lr` (Goyal et al. 2017, section 2.2). [result]"""

    @abstractmethod
    def compute_lr_factor(self, position: SchedulePosition) -> float:
        """What `lr` is multiplied by at a step after the warm-up: finite and above 0."""

    def update_plateau(
        self, state: PlateauState, steps_done: int, top1_count: int
    ) -> PlateauState:
        """What is known after one more evaluation, of a schedule that follows validation.

        Args:
            before: what was known.
            done: steps done so far, at the end of an epoch.
            right: validation samples whose highest logit is their label's.
        """
        return state

    def get_lr(
        self,
        step: int,
        steps_per_epoch: int,
        total_steps: int,
        drop_steps: Sequence[int] = (),
    ) -> float:
        """The learning rate of the run's step number `step` (from 0) of `steps`; `drops` are those of its `Stall`.

        Raises:
            UserError: it is 0, negative or not finite.
        """
        warmup = round(self.warmup_epochs * steps_per_epoch)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        fraction = (step - warmup) / max(1, total_steps - warmup)
        rate = self.lr * self.compute_lr_factor(
            SchedulePosition(step, steps_per_epoch, fraction, drop_steps)
        )
        if not 0 < rate < math.inf:
            raise UserError(
                f"schedule {self.name} has a rate of {rate} at step {step}: it must be finite and above 0"
            )
        return rate

    def explain_drop(self) -> str:
        """Why a schedule that follows validation has lowered the rate."""
        return "validation has stalled"


class ConstantSchedule(Schedule, name="constant"):
    """One learning rate for the whole run."""

    def compute_lr_factor(self, position: SchedulePosition) -> float:
        """Always 1."""
        return 1.0


class StepSchedule(Schedule, name="step"):
    """A learning rate that drops by a factor at given epochs."""

    is_multiplicative = True

    drop_epochs: tuple[int, ...] = result_field(strict=False)
    """Epochs (from 0, the warm-up counted) at whose start the rate drops. [result]"""
    factor: float = result_field(0.1, gt=0, le=1)
    """What each drop multiplies the rate by. [result]"""

    def compute_lr_factor(self, position: SchedulePosition) -> float:
        """A power of the factor."""
        return self.factor ** sum(
            position.step >= epoch * position.steps_per_epoch
            for epoch in self.drop_epochs
        )


class PlateauSchedule(Schedule, name="plateau"):
    """A learning rate that drops when the validation error stops improving (Krizhevsky et al. 2012, section 5)."""

    follows_validation = True

    patience: int = result_field(3, ge=1)
    """Epochs without more right validation samples than ever before, after which the rate drops. [result]"""
    drops: int = result_field(3, ge=1)
    """How often at most. [result]"""
    factor: float = result_field(0.1, gt=0, lt=1)
    """What each drop multiplies the rate by. [result]"""

    def compute_lr_factor(self, position: SchedulePosition) -> float:
        """A power of the factor."""
        return float(
            self.factor ** sum(position.step >= drop for drop in position.drop_steps)
        )

    def explain_drop(self) -> str:
        """For how long nothing improved."""
        return f"validation has stalled for {self.patience} epoch{'s' * (self.patience > 1)}"

    def update_plateau(
        self, state: PlateauState, steps_done: int, top1_count: int
    ) -> PlateauState:
        """Count an epoch, and drop when there were enough of them."""
        if top1_count > state.best:
            return PlateauState(top1_count, 0, state.drops)
        epochs = state.epochs + 1
        if epochs < self.patience or len(state.drops) == self.drops:
            return PlateauState(state.best, epochs, state.drops)
        return PlateauState(state.best, 0, (*state.drops, steps_done))


class PolynomialSchedule(Schedule, name="polynomial"):
    """lr (1 - t)^power, with t from 0 to 1 over the steps after the warm-up."""

    power: float = result_field(1.0, gt=0)
    """1: linear; 2: as LARS's authors trained (You et al. 2017). [result]"""

    def compute_lr_factor(self, position: SchedulePosition) -> float:
        """A power of the share that is left."""
        return float((1 - position.decay_fraction) ** self.power)


class CosineSchedule(Schedule, name="cosine"):
    """Half a cosine from lr to 0 over the steps after the warm-up (Loshchilov and Hutter 2017)."""

    def compute_lr_factor(self, position: SchedulePosition) -> float:
        """From 1 to 0."""
        return (1 + math.cos(math.pi * position.decay_fraction)) / 2


class GeometricSchedule(Schedule, name="geometric"):
    """Equal drops after equal times, over the steps after the warm-up (the best of Krizhevsky's own diary)."""

    is_multiplicative = True

    drops: int = result_field(3, ge=1)
    """How often the rate drops: the run has one level more. [result]"""
    total: float = result_field(250.0, gt=1)
    """lr over the last level's rate. [result]"""

    def compute_lr_factor(self, position: SchedulePosition) -> float:
        """A power of the drop."""
        level = int(position.decay_fraction * (self.drops + 1))
        return float(self.total ** (-level / self.drops))
