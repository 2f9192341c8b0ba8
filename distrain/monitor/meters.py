"""Numbers of the run, kept on the device between log steps: reading them is a sync point."""

from typing import NamedTuple

import torch

from distrain.optim.accumulate import Totals


class Reading(NamedTuple):
    """What happened since the last reading."""

    steps: int
    valid: int
    loss: float
    """Mean over valid samples."""
    top1: float
    """Share of valid samples."""
    top5: float
    failed_step: int | None
    """The first step whose loss or gradients were not finite, or that had no valid sample."""
    no_valid: bool
    """That step had no valid sample."""


class Meters:
    """Sums the totals of steps."""

    def __init__(self, device: torch.device, loss_shift: int) -> None:
        self._loss_shift = loss_shift
        # float64: each step's total is exact, and many of them would wrap an int64
        self._sums = torch.zeros(
            len(Totals._fields), dtype=torch.float64, device=device
        )
        self._failed = torch.full(
            (2,), -1, dtype=torch.int64, device=device
        )  # step, valid samples in it
        self._steps = 0

    def add(self, step: int, totals: Totals) -> torch.Tensor:
        """Add a step; 1 if the weights may move and 0 if not, for ever after the first failed step: float32 scalar."""
        self._steps += 1
        self._sums += torch.stack(totals)
        fails = (totals.violations > 0) | (totals.valid == 0)
        first = fails & (self._failed[0] < 0)
        now = torch.stack([torch.full_like(totals.valid, step), totals.valid])
        self._failed = torch.where(first, now, self._failed)
        return (self._failed[0] < 0).float()

    def read(self) -> Reading:
        """The numbers since the last reading, in one copy from the device."""
        numbers = torch.cat([self._sums, self._failed.double()]).tolist()
        valid, _, loss, top1, top5, failed, failed_valid = numbers
        reading = Reading(
            steps=self._steps,
            valid=int(valid),
            loss=loss / 2**self._loss_shift / valid if valid else float("nan"),
            top1=top1 / valid if valid else 0.0,
            top5=top5 / valid if valid else 0.0,
            failed_step=int(failed) if failed >= 0 else None,
            no_valid=failed_valid == 0,
        )
        self._sums.zero_()
        self._steps = 0
        return reading
