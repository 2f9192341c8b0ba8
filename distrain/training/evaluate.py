"""Evaluation: center crops, each image once, summed in integers."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distrain.config import Config
from distrain.data.batch import MicroBatch
from distrain.distributed.lane_pool import LanePool
from distrain.distributed.world import World
from distrain.losses import Loss
from distrain.training.forward_pass import predict_logits, rank_labels

# Fractional bits of a loss: the sum over 2^31 samples of loss 1 fits an int64.
LOSS_FRACTION_BITS = 32


class SampleScores(NamedTuple):
    """Scores of n samples, as integers: their sums do not depend on their order."""

    ranks: Tensor
    """Classes that rank above the label, int64 of shape (n,)."""
    fixed_losses: Tensor
    """Loss times 2^32, int64 of shape (n,); 0 where it is not finite."""
    is_finite: Tensor
    """Whether the loss is finite, and below 2^31: bool of shape (n,)."""


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

    @property
    def top1(self) -> float:
        """Fraction of samples whose highest logit is their label's; 0 of none."""
        return self.top1_count / self.num_samples if self.num_samples else 0.0

    @property
    def top5(self) -> float:
        """Fraction with their label among the five highest logits; 0 of none."""
        return self.top5_count / self.num_samples if self.num_samples else 0.0

    @staticmethod
    def from_sums(sums: Sequence[int], bad_samples: Mapping[int, str]) -> "EvalResult":
        """Build the result from the sums that `sum_scores` returns, over all chunks."""
        num_samples, top1, top5, loss_sum, num_not_finite = sums
        mean_loss = float("nan")
        if num_samples and not num_not_finite:
            mean_loss = loss_sum / 2**LOSS_FRACTION_BITS / num_samples
        return EvalResult(num_samples, top1, top5, mean_loss, dict(bad_samples))


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
    total_sums = world.all_reduce_ints(sums.tolist())
    merged_bad_samples: dict[int, str] = {}
    for bad_samples_of_rank in world.all_gather_object(bad_samples):
        for sample, reason in bad_samples_of_rank.items():
            merged_bad_samples[int(sample)] = reason
    return EvalResult.from_sums(total_sums, merged_bad_samples)


def compute_chunk_sums(config: Config, model: nn.Module, batch: MicroBatch) -> Tensor:
    """Evaluate one chunk, without waiting for the device.

    Returns:
        The sums of its scores on the device, see `sum_scores`.
    """
    logits = predict_logits(config, model, batch.images)
    scores = score_samples(config.loss, logits, batch.labels)
    return sum_scores(scores, batch.sample_weights > 0)


def score_samples(loss: Loss, logits: Tensor, labels: Tensor) -> SampleScores:
    """Score n samples by their labels, without waiting for the device.

    Args:
        loss: the loss.
        logits: float of shape (n, classes).
        labels: int64 of shape (n,).
    """
    losses = loss(logits, labels).double()
    # NaN and infinity would be different integers on each device.
    is_finite = losses.abs() < 2.0 ** (63 - LOSS_FRACTION_BITS)
    finite_losses = torch.where(is_finite, losses, 0.0)
    fixed_losses = (finite_losses * 2**LOSS_FRACTION_BITS).long()
    return SampleScores(rank_labels(logits, labels), fixed_losses, is_finite)


def sum_scores(scores: SampleScores, is_valid: Tensor) -> Tensor:
    """Sum the scores of the valid samples, without waiting for the device.

    Returns:
        int64 of shape (5,) on the device: samples, top-1, top-5, sum of the losses
        times 2^32, and number of losses that are not finite.
    """
    numbers = [
        is_valid.sum(),
        (is_valid & (scores.ranks < 1)).sum(),
        (is_valid & (scores.ranks < 5)).sum(),
        torch.where(is_valid, scores.fixed_losses, 0).sum(),
        (is_valid & ~scores.is_finite).sum(),
    ]
    return torch.stack(numbers)
