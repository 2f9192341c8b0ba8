"""The import table of CONTRIBUTING.md, and what may not be imported at all."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "distrain"

# A module may import rows above it and, on its own row, modules named before it.
ROWS = [
    ["", "errors", "philox", "sections", "settings", "config", "data.order", "data.augment", "optim.schedule"],
    [
        "peers",
        "world",
        "numerics",
        "lanes",
        "layers",
        "imported",
        "model",
        "layer_table",
        "losses",
        "data.objects",
        "data.store",
        "data.cache",
        "data.stats",
        "data.manifest",
        "data.parquet",
        "data.writer",
        "data.shards",
        "data.source",
        "data.hub",
        "data.archive",
        "data.sources",
        "data.workers",
        "optim.optimizer",
        "optim.sgd",
        "optim.adam",
        "optim.lars",
        "optim.accumulate",
        "monitor.meters",
        "monitor.sinks",
        "monitor.health",
    ],
    [
        "data.graph",
        "data.dali",
        "data.decode",
        "data.reference",
        "data.quarantine",
        "data.loader",
        "data.pack",
        "data.digits",
        "data.index",
        "data.verify",
        "lease",
        "checkpoint",
        "monitor.pageserver",
        "monitor.endpoint",
        "monitor.prometheus",
        "monitor.top",
        "monitor.trackers",
        "monitor.consoles",
        "monitor.terminal",
    ],
    [
        "step",
        "evaluate",
        "hardware",
        "record",
        "recall",
        "datasets",
        "resume",
        "job",
        "plan",
        "validate",
        "diverged",
        "train",
        "bench",
    ],
    [
        "launch.signals",
        "launch.share",
        "launch.local",
        "launch.package",
        "launch.submit",
        "launch.ray_cluster",
        "launch.kuberay",
        "launch.slurm",
        "launch.drain",
        "launch.mailbox",
        "launch.ray_rank",
        "launch.ray_fit",
        "launch.ray_train",
    ],
    ["cli_data", "cli_jobs", "cli", "__main__"],
]
THIRD_PARTIES = {
    "pydantic": ["sections", "settings", "config"],
    "yaml": ["config", "launch.kuberay"],
    "fsspec": ["data.store"],
    "obstore": ["data.objects"],
    "pyarrow": ["data.parquet", "data.writer", "launch.ray_fit"],
    "crc32c": ["data.cache", "data.writer", "data.shards", "data.index", "data.verify"],
    "nvidia": ["data.dali"],
    "PIL": ["data.decode"],
    "sklearn": ["data.digits"],
    "scipy": ["data.sources"],
    "simplejpeg": ["bench"],
    "torchvision": ["bench", "imported"],
    "matplotlib": ["plan"],
    "safetensors": ["checkpoint"],
    "prometheus_client": ["monitor.pageserver", "monitor.endpoint", "monitor.prometheus", "monitor.top"],
    "tensorboardX": ["monitor.trackers"],
    "mlflow": ["monitor.trackers"],
    "requests": ["launch.submit"],
    "kubernetes": ["launch.kuberay"],
    "urllib3": ["launch.kuberay"],
    "ray": [
        "launch.submit",
        "launch.ray_cluster",
        "launch.drain",
        "launch.ray_rank",
        "launch.ray_fit",
        "launch.ray_train",
    ],
    "typer": ["cli_data", "cli_jobs", "cli"],
    "rich": ["monitor.terminal", "cli_data", "cli"],
}
PLACE = {module: (r, i) for r, row in enumerate(ROWS) for i, module in enumerate(row)}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


MODULES = {module_name(p): p for p in PACKAGE.rglob("*.py")}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            found.add(node.module or "")
    return found


def test_every_module_has_a_place():
    folders = {"data", "optim", "monitor", "launch"}
    assert set(MODULES) - folders == set(PLACE)


@pytest.mark.parametrize("module", sorted(PLACE))
def test_imports_go_up(module):
    for name in imports(MODULES[module]):
        top = name.split(".")[0]
        if top == "distrain":
            below = name.removeprefix("distrain").removeprefix(".")
            assert PLACE[below] < PLACE[module], f"{module} imports {below}"
        elif top == "torch":
            assert PLACE[module][0] >= 1, f"{module} imports torch"
        elif top != "numpy" and top not in sys.stdlib_module_names:
            assert module in THIRD_PARTIES[top], f"{module} imports {top}"


def test_no_pickle_anywhere():
    for path in MODULES.values():
        text = path.read_text()
        assert "pickle" not in text, path
        assert "torch.load(" not in text.replace("safetensors.torch.load(", ""), path


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("cli", ("torch", "numpy", "nvidia", "pyarrow")),
        ("launch.mailbox", ("torch", "numpy", "nvidia", "pyarrow")),
        ("launch.ray_fit", ("torch", "nvidia")),
    ],
)
def test_help_the_mailbox_and_rays_controller_do_not_import_torch(module, heavy):
    code = f"import sys, distrain.{module}; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
