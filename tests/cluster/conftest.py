"""A cluster of three hosts, mended before each test, and runs on it that can be watched."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from narrow import lasting_recipe, narrow_recipe, with_own_models
from readme_commands import ROOT, shown

from distrain.config import Config
from distrain.distributed.world import World
from distrain.monitor.sinks import SilentConsole
from distrain.trainer import train

sys.path.insert(0, str(Path(__file__).parent))
from endless import Commands, Endless, Reference
from hosts import Hosts, possible
from processes import Processes

NAMESPACES = possible() and not os.environ.get("DISTRAIN_NO_NAMESPACES")
TABLE: list[tuple[str, str]] = []
NODES = ("n1", "n2", "n3")
CLUSTER = {"workers": [1, 3], "stall": 60.0}
SHORT = {
    "epochs": 2,
    "global_batch": 30,
    "virtual_workers": 6,
    "log": {"every": 20},
    "checkpoint": {"every": 20},
}
# With this for each of two forwards and three workers, a step takes a seventh of a second, and the cores a third of it.
PACE = "0.06"


@pytest.fixture(scope="session")
def plain() -> dict[str, str]:
    """The environment of all that is started, set as cluster/README.md shows it."""
    line = shown("set -a; . cluster/ray.env; set +a; unset PYTHONDONTWRITEBYTECODE")
    printed = subprocess.run(
        ["bash", "-euc", f"{' '.join(line)}; env -0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    environment = dict(item.split("=", 1) for item in printed.split("\0") if item)
    token = subprocess.run(
        shown("openssl rand -hex 32"), capture_output=True, text=True, check=True
    ).stdout
    # As an activated environment has it.
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {
        **with_own_models(environment),
        "RAY_AUTH_TOKEN": token.strip(),
        "PACE": PACE,
    }


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small disk of its own for run directories, seen by all hosts: it can be full."""
    folder = tmp_path_factory.mktemp("disk")
    if not NAMESPACES:
        yield folder
        return
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True
    )
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory, plain, disk) -> Iterator[Hosts | Processes]:
    folder = tmp_path_factory.mktemp("hosts")
    if not NAMESPACES:
        TABLE.append(
            (
                "no network namespaces",
                "cluster tests ran on Ray's cluster_utils.Cluster",
            )
        )
    hosts = (
        Hosts(folder, len(NODES), plain) if NAMESPACES else Processes(len(NODES), plain)
    )
    yield hosts
    hosts.down()


@pytest.fixture
def hosts(
    cluster: Hosts | Processes, request: pytest.FixtureRequest
) -> Hosts | Processes:
    """All three nodes up, links whole."""
    for host in NODES if NAMESPACES else ():
        cluster.heal(host)
        cluster.rate(host, None)
        cluster.lose(host, 0)
    if request.node.get_closest_marker("namespaces") and not NAMESPACES:
        pytest.skip(
            "network namespaces are not allowed here, so Ray's cluster_utils.Cluster stands in: no cables"
        )
    cluster.up(*NODES)
    return cluster


@pytest.fixture
def recipe(digits: Path, disk: Path) -> Iterator[Config]:
    """A run of 94 steps in some seconds, with a run directory on the small disk."""
    run = disk / "run"
    yield narrow_recipe(digits, run, cluster=CLUSTER, **SHORT)
    shutil.rmtree(run, ignore_errors=True)


@pytest.fixture(scope="session")
def wanted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of that run in one process that nothing disturbs, as they are printed."""
    alone = narrow_recipe(digits, tmp_path_factory.mktemp("alone"), **SHORT)
    return train(alone, World(torch.device("cpu")), SilentConsole()).weights[:16]


@pytest.fixture(scope="session")
def lasting(digits: Path, disk: Path) -> Config:
    return lasting_recipe(digits, disk / "endless", cluster=CLUSTER)


@pytest.fixture
def paced(lasting: Config, recipe: Config) -> Config:
    """The same for a test alone."""
    return lasting.model_copy(update={"run": recipe.run})


@pytest.fixture(scope="session")
def reference(
    lasting: Config, plain: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Reference]:
    """What `lasting` must equal at every checkpoint."""
    found = Reference(lasting, tmp_path_factory.mktemp("reference"), plain)
    yield found
    found.end()


@pytest.fixture(scope="session")
def shared(cluster, lasting, reference, tmp_path_factory) -> Iterator[Endless]:
    commands = Commands(cluster, tmp_path_factory.mktemp("endless"), lasting)
    yield Endless(commands, lasting, reference)
    commands.end()


@pytest.fixture
def endless(
    hosts: Hosts, shared: Endless, request: pytest.FixtureRequest
) -> Iterator[Endless]:
    """The run that the tests of faults share; one that a test has failed on is not gone on with."""
    failed = request.session.testsfailed
    yield shared
    if request.session.testsfailed > failed:
        shared.forget()


@pytest.fixture
def start(
    hosts: Hosts, shared: Endless, recipe: Config, tmp_path: Path
) -> Iterator[Commands]:
    """Starts commands on hosts, and runs on a cluster on which there is nothing else."""
    shared.stop()
    commands = Commands(hosts, tmp_path, recipe)
    yield commands
    commands.end()


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Notes a row for the table of faults."""
    return lambda text: TABLE.append((request.node.name, text))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, text in TABLE:
        terminalreporter.write_line(f"{name}: {text}")
