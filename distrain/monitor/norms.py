"""Norms of a step: of its gradient, of the weights, and of what the step changed."""

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

NORM_INTERVAL_SECONDS = 15.0
"""Seconds between two measurements at least: each copies the weights."""


class NormTracker:
    """Measures a step every `EVERY` seconds."""

    def __init__(self) -> None:
        self._last_measured, self._weights_before = -math.inf, list[Tensor]()
        self._gradient_norm: Tensor | float = 0.0

    @torch.no_grad()
    def snapshot_weights(self, parameters: Sequence[Tensor]) -> None:
        """Copy the weights, if it is time for that, and take the gradient's norm, without waiting for it.

        Not after the step: clipping and LARS change the gradient in place.
        """
        if time.monotonic() - self._last_measured > NORM_INTERVAL_SECONDS:
            self._weights_before = [p.detach().clone() for p in parameters]
            self._gradient_norm = get_total_norm(
                [p.grad for p in parameters if p.grad is not None]
            )

    @torch.no_grad()
    def compute_norms(self, parameters: Sequence[Tensor]) -> dict[str, float]:
        """Return the norms by the names of their metrics, at a sync point; none if the step is not measured."""
        if not self._weights_before:
            return {}
        self._last_measured, before, self._weights_before = (
            time.monotonic(),
            self._weights_before,
            [],
        )
        changes = [p - old for p, old in zip(parameters, before, strict=True)]
        weight, change = (
            float(get_total_norm(tensors)) for tensors in (parameters, changes)
        )
        return {
            "gradient_norm": float(self._gradient_norm),
            "weight_norm": weight,
            "update_ratio": change / weight if weight else 0.0,
        }
