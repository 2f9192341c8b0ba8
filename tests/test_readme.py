"""The READMEs say what is there: their recipes, Python, links and names."""

import re

import pytest
import torch
import yaml
from readme_commands import READMES, ROOT, blocks

from distrain.config import Config, parse_config
from distrain.losses import CrossEntropy, Loss
from distrain.models.model import Model
from distrain.optim.schedule import Schedule
from distrain.optim.update_rule import UpdateRule

README = READMES["README.md"]


def test_two_commands_one_line_each():
    """`.ci/run` takes them from here."""
    first, second = blocks(README, "sh")
    assert first.count("\n") == second.count("\n") == 1
    assert "distrain train configs/quickstart.yaml" in first
    assert "pytest" in second


def test_the_readme_is_short():
    assert len(README.split()) <= 1300


@pytest.mark.parametrize("path", READMES)
def test_the_recipes_shown_are_valid(path):
    for recipe in blocks(READMES[path], "yaml"):
        assert isinstance(parse_config(yaml.safe_load(recipe), path), Config)


def test_recipes_are_shown():
    shown = {path for path, text in READMES.items() if blocks(text, "yaml")}
    assert shown == {"README.md", "configs/README.md", "cluster/README.md"}


def test_the_python_shown_runs(tmp_path, monkeypatch, capsys, digits):
    (shown,) = blocks(README, "python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/data").mkdir(parents=True)
    (tmp_path / "runs/data/digits").symlink_to(digits)
    exec(shown, {})
    assert re.search(r"^0\.\d+ [0-9a-f]{64}$", capsys.readouterr().out, re.MULTILINE)


def test_the_own_loss_shown_is_one(tmp_path, monkeypatch):
    (shown,) = blocks(READMES["configs/README.md"], "python")
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
            assert f"`{name}`" in READMES["configs/README.md"]


def test_every_recipe_is_named():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"| `{path.stem}` |" in READMES["configs/README.md"]


@pytest.mark.parametrize("path", READMES)
def test_links_and_named_files_exist(path):
    text = READMES[path]
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = (ROOT / path).parent / name if name else ROOT / path
        assert linked.exists(), f"{path} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            anchors = {
                re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles
            }
            assert anchor in anchors, f"{path} links to {target}"
    for name in re.findall(
        r"`((?:distrain|tests|configs|cluster)/[a-z\d_./-]+)`", text
    ):
        assert (ROOT / name).exists(), f"{path} names {name}"


@pytest.mark.parametrize(
    "path",
    ["LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Dockerfile", "configs", "cluster"],
)
def test_top_level(path):
    assert (ROOT / path).exists()
