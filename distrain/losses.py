"""Losses on logits and integer labels, one value a sample: the caller sums over valid samples and divides once."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label]: (n, classes) and int64 (n,) to (n,)."""
    return F.cross_entropy(logits, labels, reduction="none")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": cross_entropy}


def correct(logits: Tensor, labels: Tensor, weights: Tensor, k: int) -> Tensor:
    """How many valid samples have their label among the k highest logits: int64 scalar.

    A tie goes to the lower class, and a logit that is not a number counts as higher: the count is the same on
    every device.
    """
    target = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=labels.device)
    below = (logits < target) | ((logits == target) & (classes >= labels[:, None]))
    hit = (~below).sum(1) < k
    return (hit & (weights > 0)).sum()
