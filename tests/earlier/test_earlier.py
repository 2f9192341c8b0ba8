"""What earlier versions left behind (`make.py` wrote it) trains on as they would have gone on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distrain.config import load_config
from distrain.data.storage.store import Store
from distrain.distributed.world import World
from distrain.rundir.checkpoint import hash_tensors
from distrain.rundir.checkpoint_loading import load_newest_checkpoint
from distrain.trainer import train

VERSIONS = sorted(
    p for p in Path(__file__).parent.iterdir() if (p / "expected.json").exists()
)


def apart(one, other) -> float:
    """Distance of two networks' weights."""
    return (
        sum(
            float((one[name] - tensor).double().square().sum())
            for name, tensor in other.items()
        )
        ** 0.5
    )


@pytest.mark.parametrize("version", VERSIONS, ids=lambda p: p.name)
def test_a_run_of_an_earlier_version_is_resumed_to_the_same_weights(
    version, tmp_path, console
):
    """To the bit where the hardware computes what it computed then, else within 2 % of the way they went since.

    Another instruction set ends 0.2 % off, a lost optimizer 50 %.
    """
    shutil.copytree(version, tmp_path, dirs_exist_ok=True)
    places = {"run": "run", "data.train": "packed", "data.val": "indexed"}
    config = load_config(
        tmp_path / "recipe.yaml",
        [f"{key}={tmp_path / name}" for key, name in places.items()],
    )
    summary = train(
        config,
        World(torch.device("cpu")),
        console,
        must_resume=True,
        accept_other_hardware=True,
    )

    expected = json.loads((version / "expected.json").read_text())
    weights = load_file(version / "final.safetensors")
    loaded, _ = load_newest_checkpoint(Store(str(tmp_path / "run")))
    assert summary.status == "finished"
    assert loaded.step == expected["steps"]
    first = load_file(
        max((version / "run/checkpoints").glob("step-*")) / "model.safetensors"
    )
    off = apart(loaded.model_state_dict, weights) / apart(first, weights)
    assert off < 0.02
    if loaded.state["hardware"] == expected["hardware"]:
        assert loaded.state["plateau"] == expected["plateau"]
        assert summary.weights == hash_tensors(weights)
