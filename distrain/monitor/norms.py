"""Norms of a step: of its gradient, of the weights, and of their change."""

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

NORM_INTERVAL_SECONDS = 15.0
"""Least seconds between two measurements: each one copies the weights."""


class NormTracker:
    """Norms of a log step, at most one every `NORM_INTERVAL_SECONDS`."""

    def __init__(self) -> None:
        self._last_measured = -math.inf
        # Copies of the weights before the step; empty if the step is not measured.
        self._weights_before = list[Tensor]()
        self._gradient_norm: Tensor | float = 0.0

    @torch.no_grad()
    def snapshot_weights(self, parameters: Sequence[Tensor]) -> None:
        """Copy the weights and take the gradient norm, if a measurement is due.

        Call it before the optimizer's step, because clipping and LARS change the
        gradient in place. It does not wait for the device.
        """
        if time.monotonic() - self._last_measured > NORM_INTERVAL_SECONDS:
            self._weights_before = [p.detach().clone() for p in parameters]
            self._gradient_norm = get_total_norm(
                [p.grad for p in parameters if p.grad is not None]
            )

    @torch.no_grad()
    def compute_norms(self, parameters: Sequence[Tensor]) -> dict[str, float]:
        """Return the norms by metric name; empty if the step is not measured.

        Call it after the step, at a sync point: it waits for the device.
        """
        if not self._weights_before:
            return {}
        self._last_measured = time.monotonic()
        # Drop the copies, to free their memory and to measure each step once.
        weights_before = self._weights_before
        self._weights_before = []

        changes = [
            after - before
            for after, before in zip(parameters, weights_before, strict=True)
        ]
        weight_norm = float(get_total_norm(parameters))
        change_norm = float(get_total_norm(changes))
        return {
            "gradient_norm": float(self._gradient_norm),
            "weight_norm": weight_norm,
            "update_ratio": change_norm / weight_norm if weight_norm else 0.0,
        }
