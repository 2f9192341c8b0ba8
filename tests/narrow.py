"""Configs for tests: short runs, and one without an end that costs little."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrain.config import Config, parse_config


def narrow_recipe(digits: Path, run: Path, /, **changes: Any) -> Config:
    """A run of a narrow model on the digits; keywords replace whole top-level keys."""
    data = {"train": str(digits / "train"), "val": None, **changes.pop("data", {})}
    tree: dict[str, Any] = {
        "run": str(run),
        "epochs": 1,
        "global_batch": 64,
        "virtual_workers": 4,
        "data": data,
        "augment": {"crop": 64},
        "model": {"name": "alexnet", "width": 0.04},
        "schedule": {"name": "constant", "lr": 0.05},
        "device": "cpu",
        "metrics": {"port": None},
    }
    return parse_config({**tree, **changes}, "test")


def loader_sections(config: Config) -> dict[str, Any]:
    """What a loader takes of a config."""
    return {
        "data": config.data,
        "augment": config.augment,
        "seed": config.seed,
        "run_dir": str(config.run),
    }


def lasting_recipe(digits: Path, run: Path, **changes: Any) -> Config:
    """A run without an end of a network that waits (`own_models.Paced`): it lasts as long as a fault needs."""
    settings = {
        "epochs": 100_000,
        "global_batch": 30,
        "virtual_workers": 6,
        "model": {"name": "own_models:Paced"},
        "log": {"every": 10},
        "checkpoint": {"every": 10, "keep": 5},
        "evaluate": {"every": 1_000_000},
    }
    return narrow_recipe(digits, run, **{**settings, **changes})


def with_own_models(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which processes find `own_models`."""
    path = [environment.get("PYTHONPATH"), str(Path(__file__).parent)]
    return {**environment, "PYTHONPATH": ":".join(filter(None, path))}
