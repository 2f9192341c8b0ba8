"""The files of a wheel, built without network from the tree and from a source distribution."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from source_copy import copy_source

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build a `wheel` or an `sdist` from a source folder, as pip does."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(folder)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture
def source(tmp_path):
    return copy_source(tmp_path / "source")


@pytest.mark.parametrize("kind", ["tree", "sdist"])
def test_a_wheel_has_modules_and_recipes_alone(source, tmp_path, kind):
    if kind == "sdist":
        with tarfile.open(build("sdist", source, tmp_path)) as tar:
            tar.extractall(tmp_path / "unpacked", filter="data")
        (source,) = (tmp_path / "unpacked").iterdir()
    modules = [path.relative_to(ROOT) for path in (ROOT / "distrain").rglob("*.py")]
    recipes = list((ROOT / "configs").glob("*.yaml"))
    expected = {
        "distrain/py.typed",
        *(path.as_posix() for path in modules),
        *(f"distrain/recipes/{path.name}" for path in recipes),
    }
    with zipfile.ZipFile(build("wheel", source, tmp_path)) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert names == expected
        for path in recipes:
            assert wheel.read(f"distrain/recipes/{path.name}") == path.read_bytes()
