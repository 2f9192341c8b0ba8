"""Every recipe trains as it is, at a reduced size: narrow, on the digits, a few steps."""

from pathlib import Path

import pytest
import torch

from distrain.config import load_config
from distrain.distributed.world import World
from distrain.launch.dry_run import describe_run
from distrain.trainer import train

RECIPES = sorted(
    p
    for p in (Path(__file__).parents[1] / "configs").glob("*.yaml")
    if p.stem != "quickstart"
)
NAMES = [
    "alexnet-adam",
    "alexnet-bn",
    "alexnet-bn-lars-32k",
    "alexnet-lars-16k",
    "alexnet-lars-8k",
    "alexnet-torchvision",
    "alexnet2012-paper",
    "alexnet2012-source",
    "hinge",
]


def test_the_recipes_that_there_are():
    assert sorted(p.stem for p in RECIPES) == NAMES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_says_where_it_is_from_and_what_to_expect(recipe):
    head = " ".join(
        line.lstrip("# ")
        for line in recipe.read_text().splitlines()
        if line.startswith("#")
    )
    assert "Expected on ILSVRC-2012: " in head
    assert "Not run here on the full set." in head
    assert "Data: distrain pack ... --geometry " in head


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_trains(recipe, digits, tmp_path, console):
    """Everything but size as it stands; the loss is finite, the weights move and stay finite, and it is evaluated."""
    reduced = {
        "run": str(tmp_path / "run"),
        "data.train": str(digits / "train"),
        "data.val": str(digits / "val"),
        "augment.crop": 64,
        "model.width": 0.05,
        "epochs": 1,
        "global_batch": 256,
        "virtual_workers": 4,
        "device": "cpu",
        "log.every": 1,
    }
    whole = load_config(recipe)
    overrides = [f"{key}={value}" for key, value in reduced.items()]
    if whole.augment.short_side:
        overrides.append("augment.short_side=72")
    config = load_config(recipe, overrides)
    assert describe_run(config, 1)["steps"] == "5 = 1 x 5 per epoch"
    summary = train(config, World(torch.device("cpu")), console)
    assert summary.status == "finished"
    assert summary.eval.samples == 359
    losses = [record.loss for record in console.records if record.kind == "train"]
    assert len(losses) == 5
    assert len(set(losses)) == 5
    assert all(loss < 100 for loss in losses), losses
