"""Sums of a run, kept on the device between log steps: reading them is a sync point."""

from typing import NamedTuple

import torch

from distrain.optim.accumulate import Totals


class MeterReading(NamedTuple):
    """Result of the steps since the last reading."""

    num_steps: int
    num_valid: int
    loss: float
    """Mean over valid samples."""
    top1: float
    """Fraction of valid samples, from 0 to 1."""
    top5: float
    """Fraction of valid samples, from 0 to 1."""
    failed_step: int | None
    """First step with a loss or gradient that is not finite, or without valid samples.
    None if there was no such step."""
    no_valid_samples: bool
    """True if the failed step had no valid sample."""


class Meters:
    """Sums of the totals of steps, on the device."""

    def __init__(self, device: torch.device, loss_shift: int) -> None:
        self._loss_shift = loss_shift
        # float64, because many steps would wrap an int64. The total of each single step
        # is exact.
        self._sums = torch.zeros(
            len(Totals._fields), dtype=torch.float64, device=device
        )
        # The first failed step and the number of valid samples in it; -1 before.
        self._first_failure = torch.full((2,), -1, dtype=torch.int64, device=device)
        self._num_steps = 0

    def add_step(self, step: int, totals: Totals) -> torch.Tensor:
        """Add the totals of a step, without a sync point.

        Returns:
            1.0 while weights may be updated; 0.0 from the first failed step on,
            forever. A float32 scalar on the device.
        """
        self._num_steps += 1
        self._sums += torch.stack(totals)
        # Keep the first failure with tensor operations: a branch on its value would
        # have to wait for the device.
        fails = (totals.violation_count > 0) | (totals.valid_count == 0)
        is_first_failure = fails & (self._first_failure[0] < 0)
        step_tensor = torch.full_like(totals.valid_count, step)
        failure = torch.stack([step_tensor, totals.valid_count])
        self._first_failure = torch.where(
            is_first_failure, failure, self._first_failure
        )
        return (self._first_failure[0] < 0).float()

    def read_and_reset(self) -> MeterReading:
        """Return the result of the steps since the last reading, in one device copy."""
        # Join all numbers first, so that there is one sync point only. int64 to float64
        # is exact here: steps and samples are far below 2**53.
        numbers = torch.cat([self._sums, self._first_failure.double()]).tolist()
        valid, _, loss, top1, top5, failed_step, valid_in_failed_step = numbers
        reading = MeterReading(
            num_steps=self._num_steps,
            num_valid=int(valid),
            loss=loss / 2**self._loss_shift / valid if valid else float("nan"),
            top1=top1 / valid if valid else 0.0,
            top5=top5 / valid if valid else 0.0,
            failed_step=int(failed_step) if failed_step >= 0 else None,
            no_valid_samples=valid_in_failed_step == 0,
        )
        # The first failure stays: no update may follow it.
        self._sums.zero_()
        self._num_steps = 0
        return reading
