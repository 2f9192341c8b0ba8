"""A copy of what distrain is built from: a build writes into its source, and reads what earlier ones left there."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("LICENSE", "README.md", "pyproject.toml", "configs", "distrain")


def copy_source(folder: Path) -> Path:
    """Copy the sources into a new folder; return it."""
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                folder / name,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        else:
            shutil.copy(ROOT / name, folder)
    return folder
