"""What the README says is what there is."""

import re
from pathlib import Path

import pytest

from distrain.config import Config, parse

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
        assert isinstance(parse(yaml.safe_load(recipe), "README.md"), Config)


def test_the_python_shown_runs(tmp_path, monkeypatch, capsys, digits):
    (shown,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    recipe = (ROOT / "configs/quickstart.yaml").read_text()
    (tmp_path / "configs/quickstart.yaml").write_text(recipe.replace("runs/data/digits", str(digits)))
    exec(shown, {})
    assert re.search(r"^0\.\d+ [0-9a-f]{64}$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("path", ["LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Dockerfile", "configs", "cluster"])
def test_top_level(path):
    assert (ROOT / path).exists()
