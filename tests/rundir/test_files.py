"""One module names the files of a run directory, and distrain/README.md says what is in each."""

import re
from pathlib import Path

from distrain.rundir import files

ROOT = Path(__file__).parents[2]
FIXED = (
    files.CONFIG_FILE,
    files.MODEL_FILE,
    files.BEST_FILE,
    files.TENSORBOARD_DIR,
    files.MLFLOW_FILE,
    files.TARGETS_FILE,
    files.BAD_SAMPLES_FILE,
    files.QUARANTINE_FILE,
)
NUMBERED = (
    files.log_path("1"),
    files.stacks_path(1, 1),
    files.not_finite_path(1),
    f"{files.CHECKPOINTS_DIR}/{files.checkpoint_name(1, 1)}",
)


def test_names_are_read_as_they_are_written():
    assert files.METRICS_PATTERN.fullmatch(files.metrics_path(7))[1] == "007"
    assert (
        files.ATTEMPT_PATTERN.fullmatch(
            files.attempt_path(7).removeprefix(f"{files.ATTEMPTS_DIR}/")
        )[1]
        == "007"
    )
    assert files.CHECKPOINT_PATTERN.fullmatch(
        files.checkpoint_name(120, 3)
    ).groups() == (
        "00000120",
        "003",
    )


def test_the_readme_says_what_is_in_each():
    text = (ROOT / "distrain/README.md").read_text()
    section = text.partition("## What is in a run directory")[2]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    shown = {name.rstrip("/") for row in rows for name in re.findall(r"`(.*?)`", row)}
    assert shown >= {*FIXED, files.metrics_path(1), files.attempt_path(1)}
    assert shown >= {re.sub(r"(?<=-)\d+", "...", name) for name in NUMBERED}


def test_no_other_module_names_them():
    starts = [
        *(set(FIXED) - {files.TENSORBOARD_DIR}),
        *(
            re.split(r"\d", name)[0] + "{"
            for name in (*NUMBERED, files.metrics_path(1))
        ),
    ]
    for path in (ROOT / "distrain").rglob("*.py"):
        for name in starts if path.name != "files.py" else ():
            assert f'"{name}' not in path.read_text(), f"{path} names {name}"
