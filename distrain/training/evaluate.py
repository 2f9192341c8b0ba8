"""Evaluation: center crops, each image once, summed in integers."""

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

# Fractional bits of a summed loss: the sum over 2^31 samples of loss 1 fits an int64.
_LOSS_FRACTION_BITS = 32


@dataclass(frozen=True)
class EvalResult:
    """Result of an evaluation, over all ranks."""

    num_samples: int
    """Images that were evaluated."""
    top1_count: int
    """Samples whose highest logit is their label's."""
    top5_count: int
    """Samples with their label among the five highest logits."""
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
    """Evaluate a model on fixed chunks of samples, distributed over the ranks.

    Chunks are independent and their sums are integers, so the result depends neither on
    the number of ranks nor on the order of the chunks.

    Args:
        config: loss and precision of the run.
        world: this rank and the others.
        model: put in evaluation mode meanwhile, in training mode after.
        batches: this rank's chunks.
        lanes: threads that evaluate several chunks at a time.
    """
    lock = threading.Lock()
    sums = torch.zeros(5, dtype=torch.int64, device=world.device)
    bad_samples: dict[int, str] = {}

    def evaluate_chunk(batch: MicroBatch) -> None:
        chunk_sums = compute_chunk_sums(config, model, batch)
        with lock:
            bad_samples.update(batch.bad_samples)
            sums.add_(chunk_sums)

    # Sum up this rank's chunks.
    model.eval()
    try:
        lanes.for_each(evaluate_chunk, batches)
    finally:
        model.train()

    # Sum over the ranks: a sync point. JSON makes strings of the sample ids.
    num_samples, top1, top5, loss_sum, num_not_finite = world.all_reduce_ints(
        sums.tolist()
    )
    merged_bad_samples: dict[int, str] = {}
    for bad_samples_of_rank in world.all_gather_object(bad_samples):
        for sample, reason in bad_samples_of_rank.items():
            merged_bad_samples[int(sample)] = reason

    mean_loss = float("nan")
    if num_samples and not num_not_finite:
        mean_loss = loss_sum / 2**_LOSS_FRACTION_BITS / num_samples
    return EvalResult(num_samples, top1, top5, mean_loss, merged_bad_samples)


def compute_chunk_sums(config: Config, model: nn.Module, batch: MicroBatch) -> Tensor:
    """Evaluate one chunk, without waiting for the device.

    Returns:
        int64 of shape (5,) on the device: samples, top-1, top-5, sum of the losses
        times 2^32, and number of losses that are not finite.
    """
    logits = predict_logits(config, model, batch.images)
    is_valid = batch.sample_weights > 0
    losses = config.loss(logits, batch.labels).double()
    # NaN and infinity are left out of the sum and counted: as integers, they would be
    # different numbers on each device.
    is_finite = is_valid & losses.isfinite()
    numbers = [
        is_valid.sum(),
        count_correct(logits, batch.labels, batch.sample_weights, 1),
        count_correct(logits, batch.labels, batch.sample_weights, 5),
        (torch.where(is_finite, losses, 0.0).sum() * 2**_LOSS_FRACTION_BITS).long(),
        (is_valid & ~is_finite).sum(),
    ]
    return torch.stack(numbers)
