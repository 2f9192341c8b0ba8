"""The import table of CONTRIBUTING.md, which this file reads, and what may not be imported at all."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "distrain"


def cells(text: str) -> list[str]:
    """The names in one cell of the table."""
    return [name.strip() for name in text.split(",") if name.strip()]


def table() -> Iterator[tuple[str, list[str], list[str]]]:
    """Each folder or file, the folders and files that it imports, and the third parties."""
    section = (
        (ROOT / "CONTRIBUTING.md")
        .read_text()
        .partition("## Import table")[2]
        .partition("\n## ")[0]
    )
    for line in section.splitlines():
        if line.startswith("| ") and not line.startswith("| folder"):
            names, rooms, third = line.strip("|").split("|")
            for name in cells(names):
                yield name, cells(rooms), cells(third)


TABLE = list(table())
PLACES = {name: i for i, (name, _, _) in enumerate(TABLE)}
ALLOWED = {name: set(rooms) for name, rooms, _ in TABLE}
THIRD_PARTIES = {name: set(third) for name, _, third in TABLE}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "/".join(p for p in parts if p != "__init__")


MODULES = {module_name(p): p for p in PACKAGE.rglob("*.py")}


def room(module: str) -> str:
    """The folder, or the file at the top or in `data`, that a module belongs to."""
    parts = module.split("/")
    return "/".join(parts[:2]) if parts[0] == "data" else parts[0]


def imports(path: Path) -> set[str]:
    """What a file imports: modules of ours as `distrain/...`, third parties by their name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name.replace(".", "/") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            assert node.module is not None
            parent = node.module.replace(".", "/")
            modules = (f"{parent}/{alias.name}" for alias in node.names)
            found.update(
                name if (ROOT / f"{name}.py").exists() else parent for name in modules
            )
    return found


IMPORTS = {module: imports(path) for module, path in MODULES.items()}


def ours(module: str) -> set[str]:
    return {
        name.removeprefix("distrain/")
        for name in IMPORTS[module]
        if name.startswith("distrain/")
    }


def test_every_folder_and_file_is_in_the_table():
    empty = {module for module in MODULES if MODULES[module].name == "__init__.py"}
    assert {room(module) for module in MODULES.keys() - empty} == set(PLACES)


def test_a_folder_imports_what_stands_above_it():
    for name, rooms in ALLOWED.items():
        assert all(PLACES[other] < PLACES[name] for other in rooms), name


@pytest.mark.parametrize("name", PLACES)
def test_imports_are_those_of_the_table(name):
    """None that it lacks, and none in it that nobody needs."""
    modules = [module for module in MODULES if room(module) == name]
    assert {room(other) for module in modules for other in ours(module)} - {
        name
    } == ALLOWED[name]
    third = {name.split("/")[0] for module in modules for name in IMPORTS[module]}
    assert (
        third - set(sys.stdlib_module_names) - {"distrain", "numpy"}
        == THIRD_PARTIES[name]
    )


def test_modules_of_a_folder_import_each_other_in_no_circle():
    TopologicalSorter({module: ours(module) for module in MODULES}).prepare()


def test_one_file_unpickles_and_restricted():
    for module, path in MODULES.items():
        text = path.read_text().replace("safetensors.torch.load(", "")
        if module == "rundir/weights_file":
            (load,) = re.findall(r"torch\.load\(.*\)", text)
            assert load.endswith("weights_only=True)")
            assert re.findall(r"pickle\.(\w+)", text) == ["UnpicklingError"]
        else:
            assert "pickle" not in text, path
            assert "torch.load(" not in text, path


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("cli.main", ("torch", "numpy", "nvidia", "pyarrow")),
        ("config", ("torch", "nvidia", "pyarrow")),
        ("config_schema", ("torch", "ray", "nvidia", "pyarrow")),
        ("data.order", ("torch", "nvidia", "pyarrow")),
        ("data.decoding.augment", ("torch", "nvidia", "pyarrow")),
        ("launch.mailbox", ("torch", "numpy", "nvidia", "pyarrow")),
        ("launch.ray_trainer", ("torch", "nvidia")),
    ],
)
def test_what_must_not_load_torch_does_not(module, heavy):
    """Help, reading a config, order and draws, the mailbox and Ray's controller."""
    code = f"import sys, distrain.{module}; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
