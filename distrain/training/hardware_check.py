"""Checks that ranks are of one kind, by doing: what they compute is hashed and compared, before the first step."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distrain.config import Config
from distrain.data.batch import BatchRequest, MicroBatch
from distrain.data.order import Cursor
from distrain.data.shards.dataset import Dataset
from distrain.distributed.lane_pool import LanePool
from distrain.distributed.world import World
from distrain.errors import UserError
from distrain.models.layers import get_trainable_parameters
from distrain.rundir.checkpoint import hash_tensors
from distrain.training.forward_pass import forward, predict_logits
from distrain.training.run_data import open_loader


def hash_sample_computation(
    config: Config,
    world: World,
    dataset: Dataset,
    model: nn.Module,
    scale: float,
    lanes: LanePool,
) -> str:
    """SHA-256 of what this rank makes of fixed inputs: a decoded batch, two micro-batches' gradients, an evaluation.

    Shapes, types, memory format and threads are those of training. `model` has its first weights.
    """
    batch = _load_first_samples(config, world, dataset)
    found: dict[str, Tensor] = {"images": batch.images}
    parameters = list(get_trainable_parameters(model).values())

    def compute_micro_batch(micro_batch: MicroBatch) -> None:
        v = micro_batch.virtual_worker
        _, loss, found[f"moments {v}"] = forward(config, model, 0, micro_batch)
        for i, gradient in enumerate(torch.autograd.grad(loss * scale, parameters)):
            found[f"gradient {v} {i}"] = gradient

    lanes.for_each(compute_micro_batch, [batch, replace(batch, virtual_worker=1)])
    model.eval()
    repeats = -(-config.evaluate.batch // len(batch.images))
    chunk = batch.images.repeat(repeats, 1, 1, 1)[: config.evaluate.batch]
    lanes.for_each(
        lambda images: found.update(evaluation=predict_logits(config, model, images)),
        [chunk],
    )
    model.train()
    return hash_tensors(found)


def _load_first_samples(config: Config, world: World, dataset: Dataset) -> MicroBatch:
    """A training micro-batch of the lowest sample ids, which lie side by side."""
    request = BatchRequest(Cursor(0, 0), 0, np.arange(config.micro_batch_size), 0)
    with open_loader(
        config, world, dataset, dataset.manifest.statistics, [request]
    ) as batches:
        return next(batches)


def check_equal_on_all_ranks(
    world: World, facts: dict[str, Any], hints: dict[str, Any] | None = None
) -> None:
    """Compare what each rank found before the first step.

    Args:
        world: the ranks.
        facts: what must be the same on all of them.
        explaining: what may differ; it is listed in the error when a fact differs.

    Raises:
        UserError: naming the first rank that differs from rank 0, and every difference.
    """
    (first, reasons), *others = world.all_gather_object([facts, hints or {}])
    for rank, (found, why) in enumerate(others, 1):
        if first != found:
            first, found = {**first, **reasons}, {**found, **why}
        differs = [
            f"\n  - {key}: {first.get(key)!r} on rank 0, {found.get(key)!r} on rank {rank}"
            for key in sorted(first.keys() | found.keys())
            if first.get(key) != found.get(key)
        ]
        if differs:
            raise UserError(
                f"rank {rank} of {world.world_size} does not fit to rank 0, so the weights would depend on the cluster; "
                f"use hosts with the same files, versions and kind of processor or GPU:{''.join(differs)}"
            )
