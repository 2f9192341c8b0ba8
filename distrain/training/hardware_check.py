"""Checks that ranks are of one kind, by doing: what they compute is hashed and compared, before the first step."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distrain.config import Config
from distrain.data.loader import MicroBatch, Request
from distrain.data.order import Cursor
from distrain.data.shards.dataset import Dataset
from distrain.distributed.lanes import Lanes
from distrain.distributed.world import World
from distrain.errors import UserError
from distrain.models.layers import trained
from distrain.rundir.checkpoint import digest
from distrain.training.datasets import open_loader
from distrain.training.step import forward, score


def fingerprint(
    config: Config,
    world: World,
    dataset: Dataset,
    model: nn.Module,
    scale: float,
    lanes: Lanes,
) -> str:
    """SHA-256 of what this rank makes of fixed inputs: a decoded batch, two micro-batches' gradients, an evaluation.

    Shapes, types, memory format and threads are those of training. `model` has its first weights.
    """
    batch = _first_samples(config, world, dataset)
    found: dict[str, Tensor] = {"images": batch.images}
    parameters = list(trained(model).values())

    def observe(micro_batch: MicroBatch) -> None:
        v = micro_batch.virtual_worker
        _, loss, found[f"moments {v}"] = forward(config, model, 0, micro_batch)
        for i, gradient in enumerate(torch.autograd.grad(loss * scale, parameters)):
            found[f"gradient {v} {i}"] = gradient

    lanes.run(observe, [batch, replace(batch, virtual_worker=1)])
    model.eval()
    repeats = -(-config.evaluate.batch // len(batch.images))
    chunk = batch.images.repeat(repeats, 1, 1, 1)[: config.evaluate.batch]
    lanes.run(
        lambda images: found.update(evaluation=score(config, model, images)), [chunk]
    )
    model.train()
    return digest(found)


def _first_samples(config: Config, world: World, dataset: Dataset) -> MicroBatch:
    """A training micro-batch of the lowest sample ids, which lie side by side."""
    request = Request(Cursor(0, 0), 0, np.arange(config.micro_batch), 0)
    with open_loader(
        config, world, dataset, dataset.manifest.statistics, [request]
    ) as batches:
        return next(batches)


def agree(
    world: World, facts: dict[str, Any], explaining: dict[str, Any] | None = None
) -> None:
    """Compare what each rank found before the first step.

    Args:
        world: the ranks.
        facts: what must be the same on all of them.
        explaining: what may differ; it is listed in the error when a fact differs.

    Raises:
        UserError: naming the first rank that differs from rank 0, and every difference.
    """
    (first, reasons), *others = world.gather([facts, explaining or {}])
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
                f"rank {rank} of {world.ranks} does not fit to rank 0, so the weights would depend on the cluster; "
                f"use hosts with the same files, versions and kind of processor or GPU:{''.join(differs)}"
            )
