"""The recipe that a command takes, and what a shell completes."""

import re
import subprocess
import sys

import pytest

from distrain.launch import launcher
from distrain.trainer import Summary

# A shell calls the command itself to complete a word of its command line.
COMPLETE = """
import sys
from distrain.cli.main import main
sys.argv = ["distrain"]
try:
    main()
finally:
    heavy = {"torch", "numpy", "ray", "pyarrow"} & set(sys.modules)
    assert not heavy, heavy
"""


@pytest.mark.parametrize("command", ["train", "lr", "submit"])
def test_commands_take_the_name_of_a_recipe(distrain, monkeypatch, tmp_path, command):
    """From any folder; a misspelled name gets the one that is meant."""
    monkeypatch.chdir(tmp_path)
    _, help_text, _ = distrain(command, "--help")
    assert "or the name of one that ships" in " ".join(re.findall(r"[\w-]+", help_text))
    code, _, err = distrain(command, "quikstart")
    assert code == 2
    assert err.startswith("error: no recipe quikstart: neither a file nor one that")
    assert err.endswith("did you mean quickstart?\n")


def test_the_run_directory_and_the_resume_command_of_a_name(
    distrain, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    code, out, err = distrain("train", "quickstart", "--dry-run")
    assert (code, err) == (0, "")
    assert "run: runs/quickstart\n" in out
    stopped = Summary("stopped", 1, 2, 1.0, None, None, "0" * 16, "exact", "runs/x")
    monkeypatch.setattr(launcher, "train_locally", lambda *_, **__: (stopped, None))
    _, out, _ = distrain("train", "quickstart", "epochs=1")
    assert "to resume: distrain train quickstart epochs=1\n" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("distrain tr", ["train"]),
        ("distrain train --dry", ["--dry-run"]),
        ("distrain train qu", ["quickstart"]),
        ("distrain lr hi", ["hinge"]),
        ("distrain submit alexnet2012-p", ["alexnet2012-paper"]),
        ("distrain train h", ["hinge", "holidays.yaml"]),
        ("distrain train mine/", ["mine/[1].yaml"]),
        ("distrain train mine/[", ["mine/[1].yaml"]),
        # Nothing: the shell then completes files and folders.
        ("distrain train mi", []),
    ],
)
def test_a_shell_completes_commands_options_and_recipes(
    plain_environment, tmp_path, words, expected
):
    (tmp_path / "mine").mkdir()
    for name in ("mine/[1].yaml", "mine/notes.txt", "holidays.yaml"):
        (tmp_path / name).touch()
    variables = {
        "_DISTRAIN_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPLETE],
        env={**plain_environment, **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == expected


def test_help_has_the_options_of_completion(distrain):
    code, out, _ = distrain("--help")
    assert code == 0
    assert "--install-completion" in out
    assert "--show-completion" in out
