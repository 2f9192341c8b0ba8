"""Evaluation: centre crop, each image once, counted in integers."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distrain.config import Config
from distrain.data.batch import MicroBatch
from distrain.distributed.lane_pool import LanePool
from distrain.distributed.world import World
from distrain.training.forward_pass import count_correct, predict_logits

# Bits behind the point of a summed loss: 2^31 samples of loss 1 fit.
_LOSS_FRACTION_BITS = 32


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found."""

    num_samples: int
    """Images that were evaluated."""
    top1_count: int
    top5_count: int
    loss: float
    """Mean over samples; NaN if one of them is not finite."""
    bad_samples: dict[int, str]
    """Reason by sample id of images that could not be decoded."""


def evaluate(
    config: Config,
    world: World,
    model: nn.Module,
    batches: Iterable[MicroBatch],
    lanes: LanePool,
) -> EvalResult:
    """Score the model on fixed chunks of samples, dealt to the ranks: chunks are independent, their sums integers."""
    lock = threading.Lock()
    sums = torch.zeros(5, dtype=torch.int64, device=world.device)
    bad: dict[int, str] = {}

    def evaluate_chunk(batch: MicroBatch) -> None:
        found = compute_chunk_sums(config, model, batch)
        with lock:
            bad.update(batch.bad_samples)
            sums.add_(found)

    model.eval()
    try:
        lanes.for_each(evaluate_chunk, batches)
    finally:
        model.train()
    samples, top1, top5, loss, not_finite = world.all_reduce_ints(sums.tolist())
    bad = {
        int(k): reason
        for part in world.all_gather_object(bad)
        for k, reason in part.items()
    }
    mean = (
        loss / 2**_LOSS_FRACTION_BITS / samples
        if samples and not not_finite
        else float("nan")
    )
    return EvalResult(samples, top1, top5, mean, bad)


def compute_chunk_sums(config: Config, model: nn.Module, batch: MicroBatch) -> Tensor:
    """Score one chunk, without waiting for the device.

    Returns:
        int64 of shape (5,) on the device: samples, top-1, top-5, loss times 2^32, and losses that are not finite.
    """
    logits = predict_logits(config, model, batch.images)
    counts = batch.sample_weights > 0
    losses = config.loss(logits, batch.labels).double()
    sound = counts & losses.isfinite()
    numbers = [
        counts.sum(),
        count_correct(logits, batch.labels, batch.sample_weights, 1),
        count_correct(logits, batch.labels, batch.sample_weights, 5),
        (torch.where(sound, losses, 0.0).sum() * 2**_LOSS_FRACTION_BITS).long(),
        (counts & ~sound).sum(),
    ]
    return torch.stack(numbers)
