"""What is computed of one micro-batch, in training, evaluation and the check of the hardware alike."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from distrain.config import Config
from distrain.data.batch import MicroBatch
from distrain.errors import UserError
from distrain.models.layers import (
    find_batch_norms,
    flatten_batch_stats,
    micro_batch_context,
)


class ForwardOutput(NamedTuple):
    """What a training forward makes of a micro-batch."""

    logits: Tensor
    """(b, classes), fp32."""
    loss: Tensor
    """Sum over valid samples."""
    batch_stats: Tensor
    """What batch normalisation tells, as `layers.flat_moments` has it."""


def forward(
    config: Config, model: nn.Module, step: int, batch: MicroBatch
) -> ForwardOutput:
    """Logits and loss of a micro-batch.

    Raises:
        UserError: a loss of the user's own does not have one value per sample.
    """
    with (
        micro_batch_context(config.seed, step, batch.virtual_worker) as now,
        autocast(config, batch.images.device),
    ):
        logits: Tensor = model(batch.images)
    logits = logits.float()
    losses = config.loss(logits, batch.labels)
    if losses.shape != batch.labels.shape:
        raise UserError(
            f"loss {config.loss.name} makes {tuple(losses.shape)} of {len(batch.labels)} samples: it must make one "
            "value per sample, without a reduction"
        )
    loss = (losses * batch.sample_weights).sum()
    return ForwardOutput(
        logits, loss, flatten_batch_stats(find_batch_norms(model), now, loss.device)
    )


def predict_logits(config: Config, model: nn.Module, images: Tensor) -> Tensor:
    """Logits (n, classes) in fp32 of a model in evaluation mode."""
    with torch.inference_mode(), autocast(config, images.device):
        logits: Tensor = model(images)
    return logits.float()


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The config's arithmetic for forward and backward."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=config.precision == "bf16"
    )


def count_correct(logits: Tensor, labels: Tensor, weights: Tensor, k: int) -> Tensor:
    """How many valid samples have their label among the k highest logits: int64 scalar.

    A tie goes to the lower class, and a logit that is not a number counts as higher: the count is the same on
    every device.
    """
    target = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=labels.device)
    below = (logits < target) | ((logits == target) & (classes >= labels[:, None]))
    hit = (~below).sum(1) < k
    return (hit & (weights > 0)).sum()
