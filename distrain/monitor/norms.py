"""Norms of a step: of its gradient, of the weights, and of what the step changed."""

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

EVERY = 15.0
"""Seconds between two measurements at least: each copies the weights."""


class Norms:
    """Measures a step every `EVERY` seconds."""

    def __init__(self) -> None:
        self._measured, self._weights = -math.inf, list[Tensor]()
        self._gradient: Tensor | float = 0.0

    @torch.no_grad()
    def before_step(self, parameters: Sequence[Tensor]) -> None:
        """Copy the weights, if it is time for that, and take the gradient's norm, without waiting for it.

        Not after the step: clipping and LARS change the gradient in place.
        """
        if time.monotonic() - self._measured > EVERY:
            self._weights = [p.detach().clone() for p in parameters]
            self._gradient = get_total_norm(
                [p.grad for p in parameters if p.grad is not None]
            )

    @torch.no_grad()
    def after_step(self, parameters: Sequence[Tensor]) -> dict[str, float]:
        """Return the norms by the names of their metrics, at a sync point; none if the step is not measured."""
        if not self._weights:
            return {}
        self._measured, before, self._weights = time.monotonic(), self._weights, []
        changes = [p - old for p, old in zip(parameters, before, strict=True)]
        weight, change = (
            float(get_total_norm(tensors)) for tensors in (parameters, changes)
        )
        return {
            "gradient_norm": float(self._gradient),
            "weight_norm": weight,
            "update_ratio": change / weight if weight else 0.0,
        }
