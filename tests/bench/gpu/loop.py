"""Measure the whole training loop, from packed shards in memory to logged metrics: `loop.py loop SECONDS`."""

import itertools
import os
import time
from typing import Any, NamedTuple
from unittest.mock import patch

from common import DATA, DRY, TMP, Out, main
from device import DEVICE, peak_memory, reset_peak_memory
from short_runs import Quiet, config

from distrain.data.decoding import dali
from distrain.distributed.world import World
from distrain.monitor.records import TrainRecord
from distrain.rundir.checkpoint import CheckpointManager
from distrain.trainer import train

CORES = len(os.sched_getaffinity(0))
SECONDS = 3.0 if DRY else 4.0
NUMBERS = itertools.count()


class Recipe(NamedTuple):
    """What differs from the default recipe."""

    name: str
    changes: dict[str, Any]
    hw_load: float = 0.0
    """Share of the JPEG engine."""


def data(
    normalise: str = "loader", read_ahead: int = 2, threads: int = CORES
) -> dict[str, Any]:
    """Return the `data` section of a config that reads the packed set."""
    read = {"decode_threads": threads, "normalise": normalise, "read_ahead": read_ahead}
    return {"data": {"train": str(DATA / "packed"), **read}}


BYTES = data("device", 3)
BF16 = {"precision": "bf16"}
TF32 = {"precision": "tf32"}
SMALL = {"log": {"every": 20}}
ONE_OF_1024 = {"global_batch": 1024, "virtual_workers": 1, "log": {"every": 5}}
LARS_8K = {
    "global_batch": 8192,
    "virtual_workers": 64,
    "log": {"every": 1},
    "model": {"name": "alexnet2012", "layers": "paper"},
    "optimizer": {"name": "lars"},
    "augment": {"crop": 227, "colour": 0.0},
}
RECIPES = [
    Recipe("default recipe as it is", {}),
    Recipe("default, two decode threads", data(threads=2)),
    Recipe("default, bf16", {**data(), **BF16, **SMALL}),
    Recipe("128 in one, bf16", {**data(), **BF16, **SMALL, "virtual_workers": 1}),
    Recipe("1024 in one, fp32", {**data(), **ONE_OF_1024}),
    Recipe("1024 in one, tf32", {**data(), **TF32, **ONE_OF_1024}),
    Recipe("1024 in one, bf16", {**data(), **BF16, **ONE_OF_1024}),
    Recipe(
        "1024 in one, bf16, bytes, engine 0.65", {**BYTES, **BF16, **ONE_OF_1024}, 0.65
    ),
    Recipe(
        "1024 in one, bf16, bytes, engine 1.0", {**BYTES, **BF16, **ONE_OF_1024}, 1.0
    ),
    Recipe(
        "1024 of eight, bf16", {**data(), **BF16, **ONE_OF_1024, "virtual_workers": 8}
    ),
    Recipe(
        "1024 in one, bf16, fast",
        {**data(), **BF16, **ONE_OF_1024, "reduction": {"mode": "fast"}},
    ),
    Recipe(
        "8192 of 16, bf16",
        {
            **BYTES,
            **BF16,
            "global_batch": 8192,
            "virtual_workers": 16,
            "log": {"every": 1},
        },
    ),
    Recipe("lars 8k recipe's network, bf16", {**BYTES, **BF16, **LARS_8K}),
]
SMALLEST = {
    "global_batch": 16,
    "virtual_workers": 2,
    "log": {"every": 2},
    "model": {"name": "alexnet", "width": 0.1},
}
DRY_RECIPES = [Recipe("dry", {**data(), **SMALLEST})]


def loop(out: Out) -> None:
    """Train in each case for some seconds."""
    for recipe in DRY_RECIPES if DRY else RECIPES:
        if not DRY and not out.has(9, recipe.name):
            return
        # Half a gigabyte at the end of each run says nothing here: what is to be saved is not written.
        with (
            out.guarded(recipe.name),
            patch.object(CheckpointManager, "_save_in_background", lambda *_: None),
        ):
            out("loop", how=recipe.name, **measure(recipe))


def measure(recipe: Recipe) -> dict[str, Any]:
    """Return the rate of a run, whose first log step is left out."""
    dali.HARDWARE_DECODER_LOAD = recipe.hw_load
    reset_peak_memory()
    own = {
        "run": f"{TMP}/loop-{next(NUMBERS)}",
        "epochs": 10_000,
        "checkpoint": {"every": 10**9},
    }
    world = World(DEVICE)
    console = Quiet(world, seconds=SECONDS)
    began = time.monotonic()
    train(config(**own, **recipe.changes), world, console)
    wall = time.monotonic() - began
    records = [r for r in console.records if isinstance(r, TrainRecord)][1:]
    images = sum(r.images_per_second * r.seconds for r in records)
    seconds = sum(r.seconds for r in records)
    waited = sum(r.data_wait * r.seconds for r in records)
    return {
        "images_per_second": round(images / seconds) if seconds else None,
        "last": round(records[-2].images_per_second) if len(records) > 1 else None,
        "data_wait": round(waited / seconds, 2) if seconds else None,
        "loss": [round(r.loss, 3) for r in (console.records[0], console.records[-1])],
        "steps": console.records[-1].step,
        "all told s": round(wall, 1),
        "MiB": peak_memory(),
    }


if __name__ == "__main__":
    main({"loop": loop})
