"""Evaluation: centre crop, each image once, counted in integers."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from distrain.config import Config
from distrain.data.loader import MicroBatch
from distrain.lanes import Lanes
from distrain.losses import correct, loss_of
from distrain.step import score
from distrain.world import World

# Bits behind the point of a summed loss: 2^31 samples of loss 1 fit.
_LOSS_BITS = 32


@dataclass(frozen=True)
class Score:
    """What an evaluation found."""

    samples: int
    """Images that were evaluated."""
    top1: int
    top5: int
    loss: float
    """Mean over samples; NaN if one of them is not finite."""
    bad: dict[int, str]
    """Reason by sample id of images that could not be decoded."""


def evaluate(config: Config, world: World, model: nn.Module, batches: Iterable[MicroBatch], lanes: Lanes) -> Score:
    """Score the model on fixed chunks of samples, dealt to the ranks: chunks are independent, their sums integers."""
    lock = threading.Lock()
    sums = [0] * 5  # samples, top-1, top-5, loss in fixed point, losses that are not finite
    bad: dict[int, str] = {}

    def chunk(batch: MicroBatch) -> None:
        logits = score(config, model, batch.images)
        losses = loss_of(config.loss, logits, batch.labels).double()[batch.weights > 0]
        finite = losses.isfinite()
        numbers = [
            batch.weights.sum().long(),
            correct(logits, batch.labels, batch.weights, 1),
            correct(logits, batch.labels, batch.weights, 5),
            (losses[finite].sum() * 2**_LOSS_BITS).long(),
            (~finite).sum(),
        ]
        read = torch.stack(numbers).tolist()
        with lock:
            bad.update(batch.bad)
            for i, number in enumerate(read):
                sums[i] += number

    model.eval()
    try:
        lanes.run(chunk, batches)
    finally:
        model.train()
    samples, top1, top5, loss, not_finite = world.totals(sums)
    bad = {int(k): reason for part in world.gather(bad) for k, reason in part.items()}
    mean = loss / 2**_LOSS_BITS / samples if samples and not not_finite else float("nan")
    return Score(samples, top1, top5, mean, bad)
