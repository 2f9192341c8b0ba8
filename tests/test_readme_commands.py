"""Each command that a README shows runs in a test: here what needs no server, elsewhere in the lane that has it."""

import ast
import json
import os
import runpy
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import kube
import numpy as np
import pytest
import torch
import typer
import yaml
from photos import write_photos
from readme_commands import (
    PARTS,
    READMES,
    ROOT,
    RUN_BY_CI,
    RUN_BY_HAND,
    SMALL,
    blocks,
    commands_in_blocks,
    commands_in_sentences,
    shown,
    write_recipe,
)
from source_copy import copy_source

from distrain.cli.main import app
from distrain.data.shards.dataset import Dataset
from distrain.models.alexnet import AlexNet

SENTENCES = sorted(
    {command for text in READMES.values() for command in commands_in_sentences(text)}
)


def is_complete(command: str) -> bool:
    """Return whether a command has all its arguments; nothing is run.

    Raises an error if distrain does not have the command or an option.
    """
    if not command.startswith("distrain "):
        return command not in PARTS
    words = command.partition(" > ")[0].replace("...", "x").split()[1:]
    found = typer.main.get_command(app)
    while hasattr(found, "commands") and not words[0].startswith("--"):
        found = found.commands[words.pop(0)]
    # A sentence may name an option without its value.
    options = {name: param for param in found.params for name in param.opts}
    needs_value = (
        bool(words) and words[-1] in options and not options[words[-1]].is_flag
    )
    if needs_value:
        words.append("x")
    values, left, _ = found.make_parser(typer.Context(found)).parse_args(words)
    assert left == [], f"{command} has more arguments than the command takes"
    return not needs_value and all(
        values.get(param.name) is not None for param in found.params if param.required
    )


def commands_to_run() -> set[str]:
    """Return what the READMEs show in code blocks, and whole commands in sentences."""
    found = {command for command in SENTENCES if is_complete(command)}
    for text in READMES.values():
        found.update(commands_in_blocks(text))
    return found


def commands_in_tests() -> set[str]:
    """Return the first arguments of all calls of `shown` in the tests."""
    found = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "shown":
                found.add(ast.literal_eval(node.args[0]))
    return found


def test_every_command_shown_runs_in_a_test():
    """And what a sentence names only in part exists."""
    shown_commands = commands_to_run()
    run = commands_in_tests() | RUN_BY_CI | RUN_BY_HAND
    missing = sorted(shown_commands - run)
    assert missing == [], "a README shows these: run them in a test, with `shown`"
    gone = sorted(run - shown_commands)
    assert gone == [], "no README shows these any longer"


# --- run here


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The folder in which the commands are typed."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(distrain, folder):
    """Run a command of distrain's, given as words, with overrides; return what it prints."""

    def call(words: list[str], *overrides: str) -> str:
        assert words[0] == "distrain"
        code, out, err = distrain(*words[1:], *overrides)
        assert (code, err) == (0, "")
        return out

    return call


@pytest.fixture
def packed(run, folder) -> Path:
    """The folder with `shards/train` and `shards/val`, packed as shown."""
    write_photos(folder)
    run(shown("distrain pack photos/train shards/train"))
    run(shown("distrain pack photos/val shards/val"))
    return folder


def test_own_images_are_trained_on_and_watched(packed, run):
    write_recipe(packed)
    out = run(shown("distrain train my.yaml"), *SMALL)
    assert "finished 1 step" in out
    assert (packed / "runs/my/checkpoints").is_dir()
    assert "runs/my  step 1\n" in run(shown("distrain top runs/my"))


def test_one_folder_of_photos_is_divided_and_trained_on(run, folder):
    for i in range(60):
        place = folder / "photos" / ("cat", "dog")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).bytes(3 * 64 * 64)
        (place / f"{i}.ppm").write_bytes(b"P6 64 64 255\n" + pixels)
    out = run(shown("distrain pack photos shards --val 0.1"), "--processes=1")
    assert "train with data.train=shards/train data.val=shards/val" in out
    write_recipe(folder)
    out = run(shown("distrain train my.yaml"), *SMALL)
    assert "validation loss" in out


def test_data_sets_are_verified_inspected_indexed_and_measured(packed, run):
    assert "8 images in 1 shard: 0 problems" in run(
        shown("distrain verify shards/train")
    )
    out = run(shown("distrain inspect shards/train --sheet sheet.png"))
    assert "8 images of 2 classes" in out
    assert (packed / "sheet.png").read_bytes().startswith(b"\x89PNG")
    small = ("--images=8", "global_batch=8")
    assert "loader" in run(shown("distrain bench data shards/train"), *small)
    (packed / "shards/train/manifest.json").unlink()
    run(shown("distrain index SRC", {"SRC": "shards/train"}))
    assert (packed / "shards/train/manifest.json").exists()


def test_images_in_two_sets_are_named(packed, distrain):
    """The sets of these tests have the same images."""
    words = shown("distrain verify shards/val --against shards/train")
    code, out, _ = distrain(*words[1:])
    assert code == 1
    assert "leaks        8 images of shards/val also in shards/train: val " in out


def test_recipes_are_looked_at_and_changed(packed, run):
    write_recipe(packed, "configs/README.md")
    out = run(shown("distrain train my.yaml --dry-run"), *SMALL)
    assert "momentum: 0.9\n" in out
    assert not (packed / "runs").exists()
    assert "0.01" in run(shown("distrain lr my.yaml"), "global_batch=8")
    run(
        shown("distrain train my.yaml optimizer.momentum=0.95 run=runs/second"),
        *SMALL,
    )
    assert "momentum: 0.95\n" in (packed / "runs/second/config.yaml").read_text()


def test_a_network_is_fine_tuned(packed, run):
    """On sets of two classes, and with a narrow network."""
    write_recipe(packed, "configs/README.md", "tuned.yaml", 1)
    given = AlexNet(width=0.05).build(1000, 0).state_dict()
    torch.save(given, packed / "alexnet.pth")
    out = run(shown("distrain train tuned.yaml"), *SMALL)
    line = (
        "init: 14 tensors from alexnet.pth; classifier.6.weight, classifier.6.bias are "
        "new: 10 classes, not 1000"
    )
    assert line in READMES["configs/README.md"]
    assert line.replace("10 classes", "2 classes") in out


def test_a_recipe_that_ships_trains_by_its_name(folder, run, digits):
    data = (f"data.train={digits}/train", f"data.val={digits}/val")
    small = ("epochs=1", "global_batch=512", "model.width=0.05", "metrics.port=null")
    run(shown("distrain train quickstart"), *data, *small)
    assert (folder / "runs/quickstart/checkpoints").is_dir()


def test_layers_are_printed(run):
    assert "60,965,224" in run(shown("distrain model alexnet2012"))


@pytest.fixture
def shell(folder, plain_environment):
    """Run a command, given as words, in a shell whose environment is activated."""
    environment = {
        **plain_environment,
        "HOME": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def call(words: list[str]) -> None:
        # Typer asks which shell has started it, so bash must not replace itself.
        line = f"{' '.join(words)}; exit $?"
        subprocess.run(["bash", "-c", line], env=environment, check=True)

    return call


def test_completion_is_installed(folder, shell):
    shell(shown("distrain --install-completion"))
    assert "distrain" in (folder / ".bashrc").read_text()


def test_the_schema_is_written(folder, shell):
    shell(shown("distrain schema > distrain.schema.json"))
    assert (
        "epochs"
        in json.loads((folder / "distrain.schema.json").read_text())["properties"]
    )


@pytest.fixture
def with_runs(folder, trained, digits, monkeypatch) -> Path:
    """The folder with the runs, sets and images that the commands name."""
    for name in ("my", "quickstart", "a", "b"):
        (folder / "runs").mkdir(exist_ok=True)
        (folder / "runs" / name).symlink_to(trained.run)
    (folder / "shards").symlink_to(digits)
    (folder / "photos").mkdir()
    dataset = Dataset.open(digits / "val")
    for place in ("cat.jpg", "photos/1.jpg", "photos/2.jpg"):
        (folder / place).write_bytes(bytes(dataset[0].data))
    return folder


def test_a_trained_model_is_evaluated(with_runs, distrain, trained):
    reported = f"top-1     {trained.records[-1].top1:.2%}"
    for words in (
        shown("distrain eval runs/quickstart"),
        shown("distrain eval runs/quickstart --data shards/val --crops ten"),
        shown("distrain eval runs/a runs/b --data shards/val"),
        shown("distrain eval runs/my --crops ten"),
    ):
        code, out, _ = distrain(*words[1:])
        assert code == 0
        assert ("crops     ten" in out) == ("ten" in words)
        assert reported in out or "ten" in words
    *words, redirect, file = shown(
        "distrain eval runs/quickstart --checkpoint best --json > result.json"
    )
    assert (redirect, file) == (">", "result.json")
    _, out, _ = distrain(*words[1:])
    assert json.loads(out)["images"] == 359


def test_images_are_predicted(with_runs, run):
    out = run(shown("distrain predict runs/quickstart cat.jpg photos"))
    assert out.count("#") > 3
    assert [line for line in out.splitlines() if line[0] != " "] == [
        "cat.jpg",
        "photos/1.jpg",
        "photos/2.jpg",
    ]
    assert run(shown("distrain predict runs/my cat.jpg")).startswith("cat.jpg\n")
    *words, redirect, file = shown(
        "distrain predict runs/quickstart photos --csv > predictions.csv"
    )
    assert (redirect, file) == (">", "predictions.csv")
    assert len(run(words).splitlines()) == 3
    (python,) = blocks(READMES["distrain/inference/README.md"], "python")
    exec(python, {})


@pytest.fixture
def install(tmp_path):
    """Run `pip install` in a copy of the tree, as far as that goes without a network."""
    source = copy_source(tmp_path / "source")

    def call(words: list[str]) -> None:
        offline = ("--dry-run", "--no-deps", "--no-index", "--no-build-isolation")
        done = subprocess.run(
            [sys.executable, "-m", *words, *offline],
            cwd=source,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Would install distrain-" in done.stdout
        # pip says nothing about an extra that does not exist.
        _, _, extras = words[-1].rstrip("]").partition("[")
        known = metadata("distrain").get_all("Provides-Extra")
        assert set(extras.split(",")) <= {*known}

    return call


def test_extras_are_installed(install):
    install(shown("pip install -e '.[gpu]'"))
    install(shown("pip install -e '.[trackers]'"))
    # There it is no checkout that is installed.
    for words in (
        shown("pip install 'distrain[ilsvrc]'", {"distrain[": ".["}),
        shown("pip install 'distrain[s3]'", {"distrain[": ".["}),
        shown("pip install 'distrain[near]'", {"distrain[": ".["}),
        shown("pip install 'distrain[client,jobs]'", {"distrain[": ".["}),
    ):
        install(words)


@pytest.fixture
def parse(monkeypatch, capsys):
    """Let a benchmark check its arguments and print its help; it takes minutes to hours to run."""

    def call(words: list[str]) -> None:
        python, script, *arguments = words
        assert python == "python"
        monkeypatch.setattr(sys, "argv", [script, *arguments, "--help"])
        monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        out, err = capsys.readouterr()
        assert (end.value.code, err) == (0, "")
        assert out.startswith(f"usage: {Path(script).name}")

    return call


def test_benchmarks_take_these_arguments(parse):
    parse(shown("python tests/bench/cluster.py start"))
    parse(shown("python tests/bench/cluster.py throughput"))
    parse(shown("python tests/bench/cluster.py save"))
    parse(shown("python tests/bench/science.py converge"))
    parse(shown("python tests/bench/science.py optimizer"))
    parse(shown("python tests/bench/science.py reduction"))
    parse(shown("python tests/bench/science.py lrn"))
    parse(shown("python tests/bench/storage.py pack"))
    parse(shown("python tests/bench/storage.py stream"))
    parse(shown("python tests/bench/storage.py memory"))
    parse(shown("python tests/bench/storage.py open"))
    parse(shown("python tests/bench/overhead.py SHARDS"))
    parse(shown("python tests/bench/fuzz.py"))
    parse(shown("python tests/bench/fine_tuning.py"))
    parse(shown("python tests/bench/metrics.py"))
    parse(shown("python tests/bench/peers.py"))
    parse(shown("python tests/bench/duplicates.py cost OTHER"))
    parse(shown("python tests/bench/duplicates.py near"))
    parse(shown("python tests/bench/duplicates.py near --images 1000"))
    parse(shown("python tests/bench/duplicates.py search"))
    parse(shown("python tests/bench/structure_fuzz.py"))


@pytest.fixture
def shared_paths(packed) -> list[str]:
    """The overrides for a job: names that mean the same on all nodes."""
    write_recipe(packed)
    return [
        "run=s3://bucket/runs/my",
        *(f"data.{split}={packed}/shards/{split}" for split in ("train", "val")),
    ]


def test_manifests_are_printed(run, shared_paths, monkeypatch):
    places = {"site/rayjob.yaml": str(ROOT / "cluster/kuberay/rayjob.yaml")}
    named = run(
        shown(
            "distrain submit my.yaml --to kuberay --template site/rayjob.yaml --dry-run",
            places,
        ),
        *shared_paths,
    )
    _, export = shown("export DISTRAIN_TEMPLATE=site/rayjob.yaml", places)
    monkeypatch.setenv(*export.split("="))
    elastic = run(
        shown("distrain submit my.yaml --to kuberay --workers 1-8 --dry-run"),
        *shared_paths,
    )
    for out in (named, elastic):
        documents = list(yaml.safe_load_all(out))
        assert [
            problem for found in documents for problem in kube.problems(found)
        ] == []
        assert [found["kind"] for found in documents] == ["RayJob", "ConfigMap"]


def test_scripts_are_printed(run, shared_paths):
    template = str(ROOT / "cluster/slurm/train.sbatch")
    named = run(
        shown(
            "distrain submit my.yaml --to slurm --template site/train.sbatch --dry-run",
            {"site/train.sbatch": template},
        ),
        *shared_paths,
    )
    assert "#SBATCH --nodes=1\n" in named
    elastic = run(
        shown(
            "distrain submit my.yaml --to slurm --template site.sbatch --workers 1-8"
            " --dry-run",
            {"site.sbatch": template},
        ),
        *shared_paths,
    )
    assert "#SBATCH --nodes=1-8\n" in elastic
    assert "s3://bucket/runs/my" in named + elastic
