"""Evaluation as plain values that can be sent to a worker, and the worker's world."""

from dataclasses import replace
from typing import NamedTuple

from distrain.config import Config
from distrain.distributed.world import World, make_local_world
from distrain.inference.trained_model import TrainedModel, open_trained_model
from distrain.launch.allocation import Allocation


class EvalRequest(NamedTuple):
    """What a worker evaluates: plain values, which can be sent to another process."""

    models: tuple[str, ...]
    """URL of each model: of a checkpoint, or of an exported folder."""
    overrides: tuple[str, ...]
    data: str
    crops: str

    def open_models(self) -> list[TrainedModel]:
        """Open the models. Raises UserError and RunError."""
        return [
            open_trained_model(url, overrides=self.overrides) for url in self.models
        ]


def make_eval_world(
    config: Config, allocation: Allocation, *, rank: int, world_size: int
) -> World:
    """Return a rank of an evaluation, which needs no process group."""
    world = make_local_world(config.device if allocation.gpus_per_worker else "cpu")
    return replace(
        world,
        rank=rank,
        world_size=world_size,
        num_cores=allocation.cpus_per_worker,
    )
