"""Forward pass of a micro-batch: in training, evaluation and the hardware check."""

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
    """Output of a training forward of one micro-batch."""

    logits: Tensor
    """(b, classes), fp32."""
    loss: Tensor
    """Sum over valid samples."""
    batch_stats: Tensor
    """Statistics of all batch norms, as `flatten_batch_stats` returns them."""


def forward(
    config: Config,
    model: nn.Module,
    step: int,
    batch: MicroBatch,
    class_weights: Tensor | None = None,
) -> ForwardOutput:
    """Compute logits and loss of a micro-batch, with the model in training mode.

    Args:
        config: the run.
        model: the network.
        step: number of the step, from 0.
        batch: the micro-batch.
        class_weights: factor on the losses of each class, float32 of shape (classes,)
            on the device; None: all alike.

    Raises:
        UserError: a loss of the user's own does not have one value per sample.
    """
    # The context keys the dropout masks, and collects the statistics of batch norm. The
    # loss is computed in fp32, outside of autocast.
    with (
        micro_batch_context(config.seed, step, batch.virtual_worker) as context,
        autocast(config, batch.images.device),
    ):
        logits: Tensor = model(batch.images)
    logits = logits.float()
    losses = config.loss(logits, batch.labels)
    if losses.shape != batch.labels.shape:
        raise UserError(
            f"loss {config.loss.name} returned shape {tuple(losses.shape)} for "
            f"{len(batch.labels)} samples: it must return one value per sample, "
            "without a reduction"
        )

    if class_weights is not None:
        losses = losses * class_weights[batch.labels]
    # Padding and bad samples have weight 0.
    loss = (losses * batch.sample_weights).sum()
    batch_stats = flatten_batch_stats(find_batch_norms(model), context, loss.device)
    return ForwardOutput(logits, loss, batch_stats)


def predict_logits(config: Config, model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits (n, classes), fp32, of a model in evaluation mode."""
    with torch.inference_mode(), autocast(config, images.device):
        logits: Tensor = model(images)
    return logits.float()


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """Return a context for forwards in the precision of the config."""
    is_bf16 = config.precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=is_bf16)


def count_correct(logits: Tensor, labels: Tensor, weights: Tensor, k: int) -> Tensor:
    """Count the valid samples with their label among the k highest logits.

    Args:
        logits: (n, classes).
        labels: int64 of shape (n,).
        weights: (n,), 0 for samples that do not count.
        k: how many of the highest logits.

    Returns:
        int64 scalar.
    """
    is_correct = rank_labels(logits, labels) < k
    return (is_correct & (weights > 0)).sum()


def rank_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the classes that rank above each sample's label: 0 if it is the highest.

    A tie goes to the lower class, and a logit that is NaN counts as higher than the
    label's. So the rank is the same on every device, which torch.topk would not
    promise.

    Args:
        logits: (n, classes), or anything that is the higher the likelier the class.
        labels: int64 of shape (n,).

    Returns:
        int64 of shape (n,).
    """
    label_logits = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=labels.device)
    # (n, classes): True where the class ranks below the label, or is the label. NaN
    # compares as false, so it never ranks below.
    is_tie_lost = (logits == label_logits) & (classes >= labels[:, None])
    is_not_above = (logits < label_logits) | is_tie_lost
    return (~is_not_above).sum(1)
