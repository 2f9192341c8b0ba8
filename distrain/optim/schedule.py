"""Learning-rate schedules: pure functions of the step and of the validation results.

A schedule of your own is a subclass of `Schedule`, named `package.module:Class` in the
recipe.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from distrain.errors import UserError
from distrain.fields import Choice, result_field


# The field names are keys of a checkpoint's state.json: renaming one breaks old runs.
@dataclass(frozen=True)
class PlateauState:
    """Validation results as a schedule remembers them.

    Integers alone, so that all ranks have the same and take the same decision.
    """

    best: int = -1
    """Highest count of correct validation samples after any epoch; -1: none yet."""
    epochs: int = 0
    """Epochs since the best one, or since the last drop if that is later."""
    drops: tuple[int, ...] = ()
    """Steps at which the learning rate dropped: it is lower from each of them on."""


@dataclass(frozen=True)
class SchedulePosition:
    """Position of a step in the run."""

    step: int
    """Step number, from 0."""
    steps_per_epoch: int
    decay_fraction: float
    """Fraction of the steps after the warm-up that are done, at least 0 and below 1."""
    drop_steps: Sequence[int]
    """Steps at which a schedule that follows validation has dropped."""


class Schedule(Choice):
    """Learning-rate schedule over a run."""

    follows_validation: ClassVar[bool] = False
    """True if the learning rate depends on validation: a validation set is required."""
    is_multiplicative: ClassVar[bool] = False
    """True if the learning rate changes by factors: it is plotted on a log axis."""
    depends_on_length: ClassVar[bool] = True
    """False if the learning rate of a step is the same for any number of epochs:
    `epochs` of a run may then be raised. A class that computes the rate anew declares
    it anew."""

    lr: float = result_field(gt=0)
    """Learning rate after the warm-up, above 0; it multiplies the mean gradient of the
    global batch. [result]"""
    warmup_epochs: float = result_field(0.0, ge=0)
    """Epochs in which the learning rate rises linearly to `lr` (Goyal et al. 2017,
    section 2.2); fractions count, 0: no warm-up. [result]"""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        # What the class inherits holds for the rate of its base class.
        has_own_rate = {"compute_lr_factor", "get_lr"} & vars(cls).keys()
        if has_own_rate and "depends_on_length" not in vars(cls):
            cls.depends_on_length = True

    @abstractmethod
    def compute_lr_factor(self, position: SchedulePosition) -> float:
        """Return the factor on `lr` at a step after the warm-up: finite, above 0."""

    def update_plateau(
        self,
        state: PlateauState,
        steps_done: int,
        top1_count: int,
    ) -> PlateauState:
        """Return the state after one more evaluation.

        Only a schedule that follows validation changes it.

        Args:
            state: the state before the evaluation.
            steps_done: steps done so far; the evaluation is at the end of an epoch.
            top1_count: validation samples whose highest logit is their label's.
        """
        return state

    def get_lr(
        self,
        step: int,
        steps_per_epoch: int,
        total_steps: int,
        drop_steps: Sequence[int] = (),
    ) -> float:
        """Return the learning rate of a step.

        Args:
            step: number of the step in the run, from 0.
            steps_per_epoch: steps of one epoch.
            total_steps: steps of the run.
            drop_steps: the drops of the run's `PlateauState`.

        Raises:
            UserError: the learning rate is 0, negative or not finite.
        """
        # The first step of the warm-up has a rate above 0, its last one has `lr`.
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        if step < warmup_steps:
            return self.lr * (step + 1) / warmup_steps
        # The schedule itself runs over the steps after the warm-up.
        decay_steps = max(1, total_steps - warmup_steps)
        position = SchedulePosition(
            step=step,
            steps_per_epoch=steps_per_epoch,
            decay_fraction=(step - warmup_steps) / decay_steps,
            drop_steps=drop_steps,
        )
        lr = self.lr * self.compute_lr_factor(position)
        # 0 is refused too: LARS and the paper's SGD divide by the ratio of two rates.
        if not 0 < lr < math.inf:
            raise UserError(
                f"schedule {self.name} has a rate of {lr} at step {step}: "
                "it must be finite and above 0"
            )
        return lr

    def explain_drop(self) -> str:
        """Explain why a schedule that follows validation has lowered the rate."""
        return "validation has stalled"


class ConstantSchedule(Schedule, name="constant"):
    """Constant learning rate."""

    depends_on_length = False

    def compute_lr_factor(self, position: SchedulePosition) -> float:
        """Return 1 at every step."""
        return 1.0


class StepSchedule(Schedule, name="step"):
    """Learning rate that drops by a factor at given epochs."""

    is_multiplicative = True
    depends_on_length = False

    drop_epochs: tuple[int, ...] = result_field(strict=False)
    """Epochs at whose start the learning rate drops, counted from 0 with the warm-up
    included. [result]"""
    factor: float = result_field(0.1, gt=0, le=1)
    """Factor on the learning rate at each drop, above 0 and at most 1. [result]"""

    def compute_lr_factor(self, position: SchedulePosition) -> float:
        """Return `factor` to the power of the drops so far."""
        num_drops = sum(
            position.step >= epoch * position.steps_per_epoch
            for epoch in self.drop_epochs
        )
        return self.factor**num_drops


class PlateauSchedule(Schedule, name="plateau"):
    """Learning rate that drops when the validation error stops improving.

    Krizhevsky et al. 2012, section 5, where it was done by hand.
    """

    follows_validation = True
    depends_on_length = False

    patience: int = result_field(3, ge=1)
    """Epochs without a new highest count of correct validation samples, after which the
    learning rate drops. [result]"""
    drops: int = result_field(3, ge=1)
    """Maximum number of drops; Krizhevsky et al. 2012 had three. [result]"""
    factor: float = result_field(0.1, gt=0, lt=1)
    """Factor on the learning rate at each drop, above 0 and below 1. [result]"""

    def compute_lr_factor(self, position: SchedulePosition) -> float:
        """Return `factor` to the power of the drops so far."""
        num_drops = sum(position.step >= drop for drop in position.drop_steps)
        return float(self.factor**num_drops)

    def explain_drop(self) -> str:
        """Say for how many epochs validation did not improve."""
        plural = "s" if self.patience > 1 else ""
        return f"validation has stalled for {self.patience} epoch{plural}"

    def update_plateau(
        self,
        state: PlateauState,
        steps_done: int,
        top1_count: int,
    ) -> PlateauState:
        """Count the epoch, and drop after `patience` epochs without improvement."""
        if top1_count > state.best:
            return PlateauState(best=top1_count, epochs=0, drops=state.drops)
        # After the last drop epochs are still counted, but have no effect.
        epochs = state.epochs + 1
        if epochs < self.patience or len(state.drops) == self.drops:
            return PlateauState(best=state.best, epochs=epochs, drops=state.drops)
        drops = (*state.drops, steps_done)
        return PlateauState(best=state.best, epochs=0, drops=drops)


class PolynomialSchedule(Schedule, name="polynomial"):
    """lr (1 - t)^power, with t from 0 to 1 over the steps after the warm-up."""

    power: float = result_field(1.0, gt=0)
    """Exponent, above 0; 1: linear; 2: as the authors of LARS trained (You et al.
    2017). [result]"""

    def compute_lr_factor(self, position: SchedulePosition) -> float:
        """Return the remaining fraction of the steps to the power of `power`."""
        return float((1 - position.decay_fraction) ** self.power)


class CosineSchedule(Schedule, name="cosine"):
    """Half a cosine from lr to 0 over the steps after the warm-up.

    Loshchilov and Hutter 2017, without restarts.
    """

    def compute_lr_factor(self, position: SchedulePosition) -> float:
        """Return the half cosine from 1 to 0."""
        return (1 + math.cos(math.pi * position.decay_fraction)) / 2


class GeometricSchedule(Schedule, name="geometric"):
    """Equal drops after equal times, over the steps after the warm-up.

    The best schedule of Krizhevsky's own diary.
    """

    is_multiplicative = True

    drops: int = result_field(3, ge=1)
    """Number of drops: the run has one level more. [result]"""
    total: float = result_field(250.0, gt=1)
    """Ratio of `lr` to the last level's learning rate, above 1. [result]"""

    def compute_lr_factor(self, position: SchedulePosition) -> float:
        """Return the factor of the current level, from 1 down to 1 / `total`."""
        level = int(position.decay_fraction * (self.drops + 1))
        return float(self.total ** (-level / self.drops))
