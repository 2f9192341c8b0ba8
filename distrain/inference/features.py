"""Last hidden layer and first filters of a trained network."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from distrain.data.batch import BatchRequest
from distrain.data.order import Cursor
from distrain.data.shards.dataset import Dataset
from distrain.distributed.numerics import set_torch_numerics
from distrain.distributed.world import make_local_world
from distrain.errors import UserError
from distrain.inference.trained_model import TrainedModel
from distrain.training.forward_pass import predict_logits
from distrain.training.run_data import open_loader


def compute_features(
    model: TrainedModel, dataset: Dataset, sample_ids: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Compute the last hidden layer of images: the input of the classifier.

    Args:
        model: the network.
        dataset: where the images are.
        sample_ids: the images, shape (n,), ascending.

    Returns:
        Shape (n, width of the layer).

    Raises:
        UserError: the network does not end in a linear classifier.
        AttemptError: the images cannot be read.
    """
    config = model.config
    batch_size = config.evaluate.batch
    world = make_local_world(config.device)
    module = model.module.to(world.device)
    exact = config.reduction.mode == "exact"
    features = list[NDArray[np.float32]]()
    requests = _iter_requests(sample_ids, batch_size)
    with (
        set_torch_numerics(world.device, precision=config.precision, exact=exact),
        _record_inputs(_find_classifier(model)) as recorded,
        open_loader(
            config, world, dataset, model.normalization, requests, evaluation=True
        ) as batches,
    ):
        for batch in batches:
            recorded.clear()
            predict_logits(config, module, batch.images)
            features.append(recorded[0].flatten(1).float().cpu().numpy())
    return np.concatenate(features)[: len(sample_ids)]


def get_first_filters(module: nn.Module) -> NDArray[np.float32] | None:
    """Return the filters that a network applies to pixels.

    Returns:
        Shape (filters, height, width, 3); None if its first convolution does not take
        RGB pixels.
    """
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    if not convolutions or convolutions[0].weight.shape[1] != 3:
        return None
    # The two towers of 2012 have such a convolution each.
    shape = convolutions[0].weight.shape[1:]
    weights = [c.weight for c in convolutions if c.weight.shape[1:] == shape]
    arrays = [w.detach().float().cpu().permute(0, 2, 3, 1).numpy() for w in weights]
    filters: NDArray[np.float32] = np.concatenate(arrays)
    return filters


def _find_classifier(model: TrainedModel) -> nn.Module:
    """Return the layer that gives the logits. Raises UserError: it is not linear."""
    layers = [m for m in model.module.modules() if isinstance(m, nn.Linear)]
    if not layers or layers[-1].out_features != len(model.info.classes):
        raise UserError("the network does not end in a linear classifier")
    return layers[-1]


@contextmanager
def _record_inputs(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Record what a layer is given, in a list that the block empties."""
    recorded = list[Tensor]()

    def record(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        recorded.append(arguments[0].detach())

    hook = layer.register_forward_pre_hook(record)
    try:
        yield recorded
    finally:
        hook.remove()


def _iter_requests(
    sample_ids: NDArray[np.int64], batch_size: int
) -> Iterator[BatchRequest]:
    """Yield chunks of images; the last one is padded with its first image."""
    for chunk, start in enumerate(range(0, len(sample_ids), batch_size)):
        ids = sample_ids[start : start + batch_size]
        num_padding = batch_size - len(ids)
        padded = np.concatenate([ids, np.repeat(ids[:1], num_padding)])
        yield BatchRequest(Cursor(0, chunk), 0, padded, num_padding)
