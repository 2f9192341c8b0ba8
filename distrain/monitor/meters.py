"""Numbers of the run, kept on the device between log steps: reading them is a sync point."""

from typing import NamedTuple

import torch

from distrain.optim.accumulate import Totals


class MeterReading(NamedTuple):
    """What happened since the last reading."""

    num_steps: int
    num_valid: int
    loss: float
    """Mean over valid samples."""
    top1: float
    """Share of valid samples."""
    top5: float
    failed_step: int | None
    """The first step whose loss or gradients were not finite, or that had no valid sample."""
    no_valid_samples: bool
    """That step had no valid sample."""


class Meters:
    """Sums the totals of steps."""

    def __init__(self, device: torch.device, loss_shift: int) -> None:
        self._loss_shift = loss_shift
        # float64: each step's total is exact, and many of them would wrap an int64
        self._sums = torch.zeros(
            len(Totals._fields), dtype=torch.float64, device=device
        )
        self._first_failure = torch.full(
            (2,), -1, dtype=torch.int64, device=device
        )  # step, valid samples in it
        self._num_steps = 0

    def add_step(self, step: int, totals: Totals) -> torch.Tensor:
        """Add a step; 1 if the weights may move and 0 if not, for ever after the first failed step: float32 scalar."""
        self._num_steps += 1
        self._sums += torch.stack(totals)
        fails = (totals.violation_count > 0) | (totals.valid_count == 0)
        first = fails & (self._first_failure[0] < 0)
        now = torch.stack(
            [torch.full_like(totals.valid_count, step), totals.valid_count]
        )
        self._first_failure = torch.where(first, now, self._first_failure)
        return (self._first_failure[0] < 0).float()

    def read_and_reset(self) -> MeterReading:
        """The numbers since the last reading, in one copy from the device."""
        numbers = torch.cat([self._sums, self._first_failure.double()]).tolist()
        valid, _, loss, top1, top5, failed, failed_valid = numbers
        reading = MeterReading(
            num_steps=self._num_steps,
            num_valid=int(valid),
            loss=loss / 2**self._loss_shift / valid if valid else float("nan"),
            top1=top1 / valid if valid else 0.0,
            top5=top5 / valid if valid else 0.0,
            failed_step=int(failed) if failed >= 0 else None,
            no_valid_samples=failed_valid == 0,
        )
        self._sums.zero_()
        self._num_steps = 0
        return reading
