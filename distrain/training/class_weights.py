"""Weights of the classes in the training loss: `loss.class_weights`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distrain.config import Config
from distrain.data.shards.dataset import Dataset
from distrain.data.shards.label_counts import count_labels
from distrain.distributed.world import World
from distrain.errors import UserError


def open_class_weights(config: Config, world: World, train: Dataset) -> Tensor | None:
    """Return the factor on the loss of a sample of each class, on the rank's device.

    Rank 0 counts the labels of the training set. All ranks must call it.

    Returns:
        float32 of shape (classes,); None without `loss.class_weights`.

    Raises:
        UserError: the list does not have one weight per class, or weighs nothing.
        AttemptError: the labels cannot be read.
    """
    if config.loss.class_weights is None:
        return None
    counts = None
    with world.raise_on_all_ranks():
        if world.is_rank_zero:
            counts = count_labels(train.store, train.manifest, config.data.patience)
    counts = world.all_gather_object(counts)[0]
    # The same counts on all ranks: all raise, or none.
    weights = compute_class_weights(config.loss.class_weights, counts)
    return torch.tensor(weights, dtype=torch.float32, device=world.device)


def compute_class_weights(
    setting: str | Sequence[float], counts: Sequence[int]
) -> list[float]:
    """Normalize the weights of classes to a mean of 1 over the samples of a set.

    Args:
        setting: balanced, which gives all classes the same sum of weights, or a weight
            per class.
        counts: samples of each class.

    Returns:
        Weight of each class; 0 where balanced classes have no sample.

    Raises:
        UserError: there are more or fewer weights than classes, or all samples would
            have weight 0.
    """
    relative = [1 / count if count else 0.0 for count in counts]
    if not isinstance(setting, str):
        relative = list(setting)
    if len(relative) != len(counts):
        raise UserError(
            f"loss.class_weights has {len(relative)} weights, and the data set has "
            f"{len(counts)} classes: give one per class, in the order that distrain "
            "inspect lists them in, or balanced"
        )
    pairs = zip(relative, counts, strict=True)
    # Without rounding in between, so that the order of the classes does not matter.
    total = math.fsum(weight * count for weight, count in pairs)
    if total == 0:
        raise UserError(
            "loss.class_weights gives weight 0 to all samples: give the classes that "
            "have samples a weight above 0"
        )
    return [weight * sum(counts) / total for weight in relative]
