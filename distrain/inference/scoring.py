"""Evaluate this rank's part of a data set, image by image."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distrain.data.batch import BatchRequest, MicroBatch, iter_evaluation_requests
from distrain.data.loader import Loader
from distrain.data.shards.class_names import match_classes
from distrain.data.shards.dataset import Dataset
from distrain.data.shards.manifest import Manifest
from distrain.data.storage.store import Store
from distrain.distributed.lane_pool import LanePool
from distrain.distributed.numerics import collect_environment, set_torch_numerics
from distrain.distributed.world import World
from distrain.errors import UserError
from distrain.inference.ensemble import ChunkPrediction, Crops, Ensemble
from distrain.inference.image_table import MAX_TOP_CLASSES, ImageTable
from distrain.inference.trained_model import TrainedModel
from distrain.losses import Loss
from distrain.rundir.checkpoint import hash_tensors
from distrain.training.evaluate import score_samples
from distrain.training.forward_pass import predict_logits
from distrain.training.run_data import open_dataset, open_loader


class EvalPart(NamedTuple):
    """Results of one rank."""

    table: ImageTable
    """Its images."""
    hardware_hash: str
    """SHA-256 of the decoded images of the first chunk and of their logits, which every
    rank computes: another hash means that other bits are computed."""
    environment: dict[str, str]
    """Versions and kind of hardware."""


def evaluate_part(
    models: Sequence[TrainedModel],
    data_url: str,
    crops: Crops,
    world: World,
    on_images: Callable[[int, int], None] | None = None,
) -> EvalPart:
    """Evaluate every `world_size`-th chunk of a data set.

    A chunk has `evaluate.batch` images of the first model's config, and is computed
    alike by any rank and on any lane.

    Args:
        models: their probabilities are averaged if there are several.
        data_url: packed or indexed data set.
        crops: crops of each image.
        world: this rank.
        on_images: gets the number of images that are done and that of all images of
            this rank, after each chunk; called from several threads, one at a time.

    Raises:
        UserError: data and models do not fit together.
        AttemptError: the data cannot be read.
    """
    models = [fit_to_images(model, data_url) for model in models]
    config = models[0].config
    exact = config.reduction.mode == "exact"
    numerics = set_torch_numerics(world.device, precision=config.precision, exact=exact)
    num_lanes = config.lanes or (1 if world.device.type == "cuda" else world.num_cores)
    with ExitStack() as stack:
        # Open what computes: numerics, lanes, data and networks.
        stack.enter_context(numerics)
        lanes = stack.enter_context(LanePool(num_lanes, config.threads, world.device))
        datasets = [_open_dataset(model, models[0], data_url) for model in models]
        networks = [_make_network(model, models[0], world) for model in models]
        open_part_loader = partial(_open_loader, models, datasets, world)

        # Hash a chunk that all ranks compute.
        num_rows = datasets[0].manifest.num_rows
        batch_size = config.evaluate.batch
        hardware_hash = _hash_first_chunk(
            open_part_loader, networks[0], num_rows, batch_size, lanes
        )

        # Evaluate this rank's chunks.
        requests = list(
            iter_evaluation_requests(
                num_rows,
                batch_size,
                world.rank,
                world.world_size,
                crops.windows,
            )
        )
        loaders = [
            stack.enter_context(open_part_loader(m, requests))
            for m in range(len(models))
        ]
        num_images = count_images(requests)
        collector = _Collector(config.loss, num_images, on_images)
        ensemble = Ensemble(networks, crops)

        def evaluate_batch(numbered: tuple[int, MicroBatch]) -> None:
            prediction = ensemble.add_part(*numbered)
            if prediction is not None:
                collector.add_chunk(prediction)

        lanes.for_each(evaluate_batch, _interleave(loaders))
    table = ImageTable.merge(collector.tables)
    return EvalPart(table, hardware_hash, collect_environment(world.device))


def fit_to_images(model: TrainedModel, data_url: str) -> TrainedModel:
    """Let a model resize the images of a data set where it could not take them else.

    A model whose training images were used as they are stored takes such images as they
    are. Images that differ in size, or are smaller than its input, are resized to the
    short side of its training images, as in a prediction.

    Raises:
        UserError: there is no data set.
        AttemptError: its manifest cannot be read.
    """
    config = model.config
    manifest = Manifest.load(Store(data_url), config.data.patience)
    fits = manifest.image_size and min(manifest.image_size) >= model.info.crop
    if fits or config.augment.short_side is not None:
        return model
    sizes = {"short_side": model.info.resized_side}
    augment = config.augment.model_copy(update=sizes)
    return replace(model, config=config.model_copy(update={"augment": augment}))


def count_images(requests: Sequence[BatchRequest]) -> int:
    """Return the number of different images in the chunks of an evaluation."""
    sizes = {
        request.cursor.step: len(request.sample_ids) - request.num_padding
        for request in requests
    }
    return sum(sizes.values())


class _Collector:
    """Collects the results per image, from several lanes at once."""

    def __init__(
        self,
        loss: Loss,
        num_images: int,
        on_images: Callable[[int, int], None] | None,
    ) -> None:
        self._loss = loss
        self._num_images = num_images
        self._on_images = on_images
        self._lock = threading.Lock()
        self._num_done = 0
        self.tables: list[ImageTable] = []
        """One per chunk."""

    def add_chunk(self, prediction: ChunkPrediction) -> None:
        """Add the images of a chunk, without its padding. Waits for the device."""
        table = _make_table(self._loss, prediction)
        with self._lock:
            self.tables.append(table)
            self._num_done += len(table.labels)
            if self._on_images is not None:
                self._on_images(self._num_done, self._num_images)


def _make_table(loss: Loss, prediction: ChunkPrediction) -> ImageTable:
    """Return the results of a chunk's images, without its padding."""
    batch = prediction.batch
    scores = score_samples(loss, prediction.logits, batch.labels)
    top = find_top_classes(prediction.logits, prediction.probabilities)

    # Padding repeats the chunk's first sample.
    is_padding = batch.sample_ids == batch.sample_ids[0]
    is_padding[0] = False
    rows = np.flatnonzero(~is_padding)

    def take_rows(column: Tensor) -> NDArray[Any]:
        array: NDArray[Any] = column.cpu().numpy()[rows]
        return array

    return ImageTable(
        sample_ids=batch.sample_ids[rows],
        labels=take_rows(batch.labels),
        is_valid=take_rows(batch.sample_weights > 0),
        ranks=take_rows(scores.ranks),
        fixed_losses=take_rows(scores.fixed_losses),
        is_finite=take_rows(scores.is_finite),
        top_classes=take_rows(top.classes),
        top_probabilities=take_rows(top.probabilities),
        bad_samples=batch.bad_samples,
    )


class TopClasses(NamedTuple):
    """Highest classes of n images, the highest first; k is 5, or all classes."""

    classes: Tensor
    """int64 of shape (n, k)."""
    probabilities: Tensor
    """float64 of shape (n, k)."""


def find_top_classes(logits: Tensor, probabilities: Tensor) -> TopClasses:
    """Find the highest classes of each image, by its logits (n, classes).

    A tie goes to the lower class, as in `rank_labels`.
    """
    order = logits.sort(dim=1, descending=True, stable=True).indices
    classes = order[:, :MAX_TOP_CLASSES]
    return TopClasses(classes, probabilities.gather(1, classes))


def _open_dataset(model: TrainedModel, first: TrainedModel, url: str) -> Dataset:
    """Open the data set for a model, with the labels of the first model's classes.

    Raises:
        UserError: it does not exist, has a class that the model lacks, or its images
            are too small.
    """
    config = model.config
    dataset = open_dataset(
        url,
        config.data,
        config.augment,
        sequential_batch_size=first.config.evaluate.batch,
    )
    numbers = match_classes(
        dataset.classes,
        Store(url).redacted_url,
        first.info.classes,
        first.origin.run,
    )
    dataset.renumber_classes(first.info.classes, numbers)
    return dataset


def _make_network(
    model: TrainedModel, first: TrainedModel, world: World
) -> Callable[[Tensor], Tensor]:
    """Return the function from images to logits, in the order of the first's classes.

    Raises:
        UserError: the models have different classes, or another precision.
    """
    if model.config.precision != first.config.precision:
        raise UserError(
            f"{model.origin.run} was trained in {model.config.precision}, and "
            f"{first.origin.run} in {first.config.precision}: set precision= for all"
        )
    compute_logits = partial(
        predict_logits, model.config, model.module.to(world.device)
    )
    if model.info.classes == first.info.classes:
        return compute_logits

    # Match the classes by name, both ways: neither may have one that the other lacks.
    runs = (model.origin.run, first.origin.run)
    numbers = match_classes(model.info.classes, runs[0], first.info.classes, runs[1])
    match_classes(first.info.classes, runs[1], model.info.classes, runs[0])
    order = torch.tensor(numbers, device=world.device).argsort()
    return lambda images: compute_logits(images)[:, order]


def _open_loader(
    models: Sequence[TrainedModel],
    datasets: Sequence[Dataset],
    world: World,
    m: int,
    requests: Sequence[BatchRequest],
) -> Loader:
    """Start the loader of a model, with chunks of the first model's size."""
    config = models[m].config.model_copy(update={"evaluate": models[0].config.evaluate})
    normalization = models[m].normalization
    return open_loader(
        config, world, datasets[m], normalization, requests, evaluation=True
    )


def _interleave(loaders: Sequence[Loader]) -> Iterator[tuple[int, MicroBatch]]:
    """Yield the batches of all models, with the model's number, chunk by chunk."""
    for batches in zip(*loaders, strict=True):
        yield from enumerate(batches)


def _hash_first_chunk(
    open_part_loader: Callable[[int, Sequence[BatchRequest]], Loader],
    compute_logits: Callable[[Tensor], Tensor],
    num_rows: int,
    batch_size: int,
    lanes: LanePool,
) -> str:
    """Return the SHA-256 of the first chunk's center crops and of their logits."""
    results: dict[str, Tensor] = {}

    def compute_chunk(batch: MicroBatch) -> None:
        results["images"] = batch.images
        results["logits"] = compute_logits(batch.images)

    requests = iter_evaluation_requests(num_rows, batch_size, 0, 1)
    with open_part_loader(0, [next(requests)]) as batches:
        lanes.for_each(compute_chunk, batches)
    return hash_tensors(results)
