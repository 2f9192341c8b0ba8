"""What the README says is what there is."""

import re
from pathlib import Path

import pytest
import torch

from distrain.config import Config, parse_config
from distrain.losses import CrossEntropy, Loss
from distrain.models.model import Model
from distrain.optim.schedule import Schedule
from distrain.optim.update_rule import UpdateRule

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_two_commands_one_line_each():
    """`.ci/run` takes them from here."""
    first, second = blocks("sh")
    assert first.count("\n") == second.count("\n") == 1
    assert "distrain train configs/quickstart.yaml" in first
    assert "pytest" in second


def test_the_recipes_shown_are_valid():
    import yaml

    shown = blocks("yaml")
    assert len(shown) == 2
    for recipe in shown:
        assert isinstance(parse_config(yaml.safe_load(recipe), "README.md"), Config)


def test_the_python_shown_runs(tmp_path, monkeypatch, capsys, digits):
    shown, _ = blocks("python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    recipe = (ROOT / "configs/quickstart.yaml").read_text()
    (tmp_path / "configs/quickstart.yaml").write_text(
        recipe.replace("runs/data/digits", str(digits))
    )
    exec(shown, {})
    assert re.search(r"^0\.\d+ [0-9a-f]{64}$", capsys.readouterr().out, re.MULTILINE)


def test_the_own_loss_shown_is_one(tmp_path, monkeypatch):
    _, shown = blocks("python")
    (tmp_path / "shown_losses.py").write_text(shown)
    monkeypatch.syspath_prepend(tmp_path)
    tree = {"data": {"train": "x"}, "schedule": {"name": "constant", "lr": 0.1}}
    loss = parse_config(
        {**tree, "loss": {"name": "shown_losses:Focal", "gamma": 0.0}}, "README.md"
    ).loss
    logits, labels = torch.randn(8, 5), torch.arange(8) % 5
    torch.testing.assert_close(loss(logits, labels), CrossEntropy()(logits, labels))


def test_every_form_of_a_choice_is_named():
    for kind in (Model, Loss, UpdateRule, Schedule):
        for name in kind.registry:
            assert f"`{name}`" in README


@pytest.mark.parametrize(
    "path",
    ["LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Dockerfile", "configs", "cluster"],
)
def test_top_level(path):
    assert (ROOT / path).exists()
