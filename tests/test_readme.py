"""The READMEs say what is there: their recipes, Python, commands, links and names."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
import yaml
from photos import encoded, picture

from distrain.cli.main import app
from distrain.config import Config, parse_config
from distrain.losses import CrossEntropy, Loss
from distrain.models.model import Model
from distrain.optim.schedule import Schedule
from distrain.optim.update_rule import UpdateRule

ROOT = Path(__file__).parents[1]
READMES = {
    path: (ROOT / path).read_text()
    for path in (
        "README.md",
        "configs/README.md",
        "distrain/README.md",
        "distrain/data/README.md",
        "cluster/README.md",
        "tests/bench/README.md",
        "CONTRIBUTING.md",
    )
}
README = READMES["README.md"]


def blocks(text: str, language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in fences if name == language]


def commands(text: str) -> list[list[str]]:
    """The words of every `distrain ...` in a code block or in backticks."""
    lines = [
        line
        for block in (*blocks(text, ""), *blocks(text, "sh"))
        for line in block.splitlines()
        if "distrain " in line
    ]
    lines += re.findall(r"`(distrain [^`]+)`", text.replace("\n", " "))
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        starts = [i for i, word in enumerate(words) if word in ("distrain", "|")]
        for i in starts:
            if words[i] == "|":
                continue
            end = next((j for j in starts if j > i), len(words))
            found.append(words[i + 1 : end])
    return [words for words in found if words and words[0] != "&&"]


COMMANDS = [(path, words) for path, text in READMES.items() for words in commands(text)]


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


@pytest.mark.parametrize(
    ("path", "words"), COMMANDS, ids=[" ".join(words) for _, words in COMMANDS]
)
def test_every_command_shown_is_one(path, words):
    """It has the arguments and options that the command takes; nothing is run."""
    group = typer.main.get_command(app)
    words = [word.replace("...", "x") for word in words]
    if words[0].startswith("--"):
        context = group.make_context("distrain", list(words), resilient_parsing=True)
        assert context.args == []
        return
    name, *arguments = words
    assert name in group.commands, f"{path} has the command {' '.join(words)}"
    command = group.commands[name]
    if not arguments or arguments == ["COMMAND", "--help"]:
        return  # named in a sentence, not shown
    if hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    options = {o: param for param in command.params for o in param.opts}
    last = options.get(arguments[-1])
    if last is not None and not last.is_flag:
        arguments.append("x")  # a sentence names the option without its value
    parser = command.make_parser(typer.Context(command))
    parser.parse_args(arguments)


def test_commands_are_found_in_all_readmes_but_those_of_the_bench():
    assert {path for path, _ in COMMANDS} >= set(READMES) - {
        "tests/bench/README.md",
        "CONTRIBUTING.md",
    }


def test_the_python_shown_runs(tmp_path, monkeypatch, capsys, digits):
    (shown,) = blocks(README, "python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    recipe = (ROOT / "configs/quickstart.yaml").read_text()
    (tmp_path / "configs/quickstart.yaml").write_text(
        recipe.replace("runs/data/digits", str(digits))
    )
    exec(shown, {})
    assert re.search(r"^0\.\d+ [0-9a-f]{64}$", capsys.readouterr().out, re.MULTILINE)


def test_own_images_are_packed_and_trained_as_shown(tmp_path, monkeypatch, distrain):
    """The README's commands as typed, on a few images; of the run one step."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for i in range(4):
                (folder / f"{i}.jpg").write_bytes(encoded(picture(i, 80, 60)))
    (recipe,) = blocks(README, "yaml")
    Path("my.yaml").write_text(recipe)
    (shown,) = [block for block in blocks(README, "") if "distrain pack" in block]
    typed = [
        words[1:]
        for line in shown.splitlines()
        if (words := shlex.split(line, comments=True))
    ]
    packs = [words for words in typed if words[0] == "pack"]
    (train, *_) = [words for words in typed if words[0] == "train"]
    assert len(packs) == 2
    for words in packs:
        code, _, err = distrain(*words)
        assert (code, err) == (0, "")
    small = ["global_batch=8", "epochs=1", "schedule.drop_epochs=[1]", "precision=fp32"]
    code, out, err = distrain(*train, *small, "model.width=0.05")
    assert (code, err) == (0, "")
    assert "my" in out
    assert Path("runs/my/checkpoints").is_dir()


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
