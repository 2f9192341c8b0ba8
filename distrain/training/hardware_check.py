"""Check that all ranks compute identical bits.

Each rank hashes a sample computation before the first step; the hashes are compared.
"""

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
    class_weights: Tensor | None,
    scale: float,
    lanes: LanePool,
) -> str:
    """Hash what this rank computes from fixed inputs.

    These are a decoded batch, the gradients of two micro-batches and an evaluation,
    with the shapes, types, memory format and threads of training.

    Args:
        config: the run.
        world: this rank.
        dataset: the training set.
        model: with its first weights, in training mode.
        class_weights: factor on the losses of each class, as in training.
        scale: factor of the loss sum, as in training.
        lanes: threads that compute, as in training.

    Returns:
        SHA-256.
    """
    # Decode a batch.
    batch = _load_first_samples(config, world, dataset)
    results: dict[str, Tensor] = {"images": batch.images}
    parameters = list(get_trainable_parameters(model).values())

    def compute_micro_batch(micro_batch: MicroBatch) -> None:
        v = micro_batch.virtual_worker
        output = forward(config, model, 0, micro_batch, class_weights)
        gradients = torch.autograd.grad(output.loss * scale, parameters)
        # These names are hashed too: with others, no earlier checkpoint would fit.
        results[f"moments {v}"] = output.batch_stats
        for i, gradient in enumerate(gradients):
            results[f"gradient {v} {i}"] = gradient

    def evaluate_chunk(images: Tensor) -> None:
        results["evaluation"] = predict_logits(config, model, images)

    # Forward and backward of two virtual workers, which differ in their dropout masks.
    lanes.for_each(compute_micro_batch, [batch, replace(batch, virtual_worker=1)])

    # Evaluate a chunk, filled up with copies of the batch.
    model.eval()
    repeats = -(-config.evaluate.batch // len(batch.images))
    chunk = batch.images.repeat(repeats, 1, 1, 1)[: config.evaluate.batch]
    lanes.for_each(evaluate_chunk, [chunk])
    model.train()
    return hash_tensors(results)


def _load_first_samples(config: Config, world: World, dataset: Dataset) -> MicroBatch:
    """Load a micro-batch of the lowest sample ids, which are stored together."""
    request = BatchRequest(Cursor(0, 0), 0, np.arange(config.micro_batch_size), 0)
    statistics = dataset.manifest.statistics
    with open_loader(config, world, dataset, statistics, [request]) as batches:
        return next(batches)


def check_equal_on_all_ranks(
    world: World, facts: dict[str, Any], hints: dict[str, Any] | None = None
) -> None:
    """Compare facts of all ranks before the first step.

    Args:
        world: the ranks.
        facts: must be the same on all ranks; plain values by name.
        hints: may differ; listed in the error when a fact differs.

    Raises:
        UserError: names the first rank that differs from rank 0, and every difference.
    """
    rank_zero, *others = world.all_gather_object([facts, hints or {}])
    for rank, (rank_facts, rank_hints) in enumerate(others, 1):
        zero_facts, zero_hints = rank_zero
        if zero_facts == rank_facts:
            continue

        # Hints are compared now too: they may be the cause.
        expected = {**zero_facts, **zero_hints}
        actual = {**rank_facts, **rank_hints}
        differences = [
            f"\n  - {key}: {expected.get(key)!r} on rank 0, "
            f"{actual.get(key)!r} on rank {rank}"
            for key in sorted(expected.keys() | actual.keys())
            if expected.get(key) != actual.get(key)
        ]
        if differences:
            raise UserError(
                f"rank {rank} of {world.world_size} differs from rank 0, so the result "
                "would depend on where ranks are placed; use nodes with the same "
                f"files, versions and kind of processor or GPU:{''.join(differences)}"
            )
