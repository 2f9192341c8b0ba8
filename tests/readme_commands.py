"""The commands that the READMEs show. A test that runs one takes its words from here, by `shown`.

`tests/test_readme_commands.py` fails if a command is shown that no test takes.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
READMES = {
    path: (ROOT / path).read_text()
    for path in (
        "README.md",
        "configs/README.md",
        "distrain/README.md",
        "distrain/data/README.md",
        "distrain/inference/README.md",
        "distrain/reports/README.md",
        "cluster/README.md",
        "tests/bench/README.md",
        "CONTRIBUTING.md",
    )
}
# `.ci/run` installs, checks and tests in this way, and trains the whole quickstart.
RUN_BY_CI = {
    "pip install -e .",
    "pip install -e '.[jobs]'",
    "pip install -e '.[test]'",
    "pip uninstall nvidia-dali-cuda130 && pip install nvidia-dali-cuda120",
    "pytest -n auto",
    "pytest -m cluster",
    "pytest -m slurm",
    "pytest -m s3",
    "pytest -m prometheus",
    "pytest -m browser",
    "pytest tests/data/test_order.py",
    ".venv/bin/pip install -e '.[dev,quickstart]'",
    ".venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy && "
    ".venv/bin/mypy --config-file tests/mypy.ini tests && .venv/bin/pytest -n auto",
    "distrain train configs/quickstart.yaml",
}
# No test has what these need: a Docker daemon, root and 25 GB, a GPU.
RUN_BY_HAND = {
    "docker build -t REGISTRY/distrain:0.1.0 .",
    "python3.12 tests/docker.py",
    "pytest -m gpu",
}
# What a sentence names, but does not show in full.
PARTS = {"ray start", "ray start --block"}
# What makes the README's recipe one of a few steps of a small network.
SMALL = (
    "global_batch=8",
    "epochs=1",
    "schedule.drop_epochs=[1]",
    "precision=fp32",
    "model.width=0.05",
    "metrics.port=null",
)


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a README that are marked with a language."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in fences if name == language]


def commands_in_blocks(text: str) -> list[str]:
    """Return the commands in code blocks, without their comments.

    Blocks marked `sh` are not among them: `.ci/run` takes those from the README itself.
    """
    found = []
    for block in blocks(text, ""):
        if re.search(r"^(distrain |\.venv/bin/)", block, re.MULTILINE):
            found += [re.sub(r"\s+# .*", "", line) for line in block.splitlines()]
    return found


def commands_in_sentences(text: str) -> list[str]:
    """Return commands in backticks, and parts of some, of all programs that a README names."""
    programs = (
        "distrain|kubectl|promtool|ray|pip|pytest|python|python3.12|docker|ssh|openssl|"
        "sysctl"
    )
    # Blocks of code are not among them.
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.sub(r"\s+", " ", text)
    return re.findall(rf"`((?:{programs}) [^`]+)`", lines)


SHOWN = {
    command
    for text in READMES.values()
    for command in (*commands_in_blocks(text), *commands_in_sentences(text))
}


def shown(command: str, places: Mapping[str, str] | None = None) -> list[str]:
    """Return the words of a command that a README shows, with some of its text replaced.

    Args:
        command: the command as it is shown, without a comment.
        places: names of files, hosts and jobs, and what they are in the test.
    """
    assert command in SHOWN, f"no README shows {command}"
    for name, place in (places or {}).items():
        assert name in command, f"{name} is not in {command}"
        command = command.replace(name, place)
    return shlex.split(command)


def write_recipe(
    folder: Path, readme: str = "README.md", name: str = "my.yaml", number: int = 0
) -> Path:
    """Write a recipe that a README shows, the first unless said, as a file; return its path."""
    (folder / name).write_text(blocks(READMES[readme], "yaml")[number])
    return folder / name
