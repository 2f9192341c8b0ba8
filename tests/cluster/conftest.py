"""A cluster of three hosts, mended before each test, and runs on it that can be watched."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distrain.config import Config, to_yaml
from distrain.monitor.sinks import Silent
from distrain.train import train
from distrain.world import World

sys.path.insert(0, str(Path(__file__).parent))
from hosts import HEAD, PYTHON, Hosts, possible
from processes import Processes
from waiting import await_that

NAMESPACES = possible() and not os.environ.get("DISTRAIN_NO_NAMESPACES")
TABLE: list[tuple[str, str]] = []
NODES = ("n1", "n2", "n3")


@pytest.fixture(scope="session")
def plain() -> dict[str, str]:
    """The environment of all that is started: compiled modules may be kept, Ray's as in cluster/ray.env."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as an activated environment has it
    lines = (Path(__file__).parents[2] / "cluster/ray.env").read_text().splitlines()
    settings = dict(line.split("=") for line in lines if not line.startswith("#"))
    return {**environment, **settings, "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small disk of its own for run directories, seen by all hosts: it can be full."""
    folder = tmp_path_factory.mktemp("disk")
    if not NAMESPACES:
        yield folder
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory, plain, disk) -> Iterator[Hosts | Processes]:
    folder = tmp_path_factory.mktemp("hosts")
    if not NAMESPACES:
        TABLE.append(("no network namespaces", "cluster tests ran on Ray's cluster_utils.Cluster"))
    hosts = Hosts(folder, len(NODES), plain) if NAMESPACES else Processes(len(NODES), plain)
    yield hosts
    hosts.down()


@pytest.fixture
def hosts(cluster: Hosts | Processes, request: pytest.FixtureRequest) -> Iterator[Hosts | Processes]:
    """All three nodes up, links whole."""
    for host in NODES if NAMESPACES else ():
        cluster.heal(host)
        cluster.rate(host, None)
        cluster.lose(host, 0)
    if request.node.get_closest_marker("namespaces") and not NAMESPACES:
        pytest.skip("network namespaces are not allowed here, so Ray's cluster_utils.Cluster stands in: no cables")
    cluster.up(*NODES)
    return cluster


@pytest.fixture
def recipe(narrow, disk) -> Iterator[Config]:
    """A run of 235 steps in some seconds, with a run directory on the small disk."""
    run = disk / "run"
    yield narrow(
        run=str(run),
        epochs=5,
        global_batch=30,
        virtual_workers=6,
        log={"every": 20},
        checkpoint={"every": 20},
        evaluate={"every": 10_000},
        cluster={"workers": [1, 3], "stall": 60.0},
    )
    shutil.rmtree(run, ignore_errors=True)


@pytest.fixture
def longer(recipe: Config) -> Config:
    """A run of 1,128 steps, which still trains when Ray has noticed that a node came or will go."""
    return recipe.model_copy(update={"epochs": 24})


@pytest.fixture(scope="session")
def known() -> dict[tuple[int, int], str]:
    return {}


@pytest.fixture
def wanted(recipe: Config, known: dict[tuple[int, int], str], tmp_path: Path) -> Callable[..., str]:
    """The weights of the undisturbed run in one process, as they are printed."""

    def weights(config: Config = recipe) -> str:
        length = (config.epochs, config.global_batch)
        if length not in known:
            alone = config.model_copy(update={"run": str(tmp_path / "alone")})
            known[length] = train(alone, World(torch.device("cpu")), Silent()).weights[:16]
        return known[length]

    return weights


class Run:
    """`distrain train` as a process on a host, its lines read as they come, with their times."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self._began = process, time.monotonic()
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                self.lines.append((time.monotonic(), line.rstrip()))

    def join(self) -> None:
        self._reader.join()

    @property
    def text(self) -> str:
        return "\n".join(f"{at - self._began:6.1f} s  {line}" for at, line in self.lines)

    def told(self, pattern: str, since: float = 0.0) -> float | None:
        """When a line matched for the first time."""
        return next((at for at, line in self.lines if at > since and re.search(pattern, line)), None)

    def wait_for(self, pattern: str, since: float = 0.0, seconds: float = 90.0) -> float:
        end = time.monotonic() + seconds
        while not self.told(pattern, since) and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        found = self.told(pattern, since)
        assert found is not None, self.text
        return found

    def wait_for_step(self, step: int, since: float = 0.0) -> None:
        def reached() -> bool:
            steps = [int(m[1]) for at, line in self.lines if at > since and (m := re.search(r"step (\d+)/", line))]
            return (bool(steps) and max(steps) >= step) or self.process.poll() is not None

        await_that(reached, f"step {step}", 90)
        assert self.process.poll() is None, self.text

    def end(self, code: int = 0, seconds: float = 180.0) -> str:
        self.process.wait(timeout=seconds)
        self.join()
        assert self.process.returncode == code, self.text
        return self.text

    def weights(self) -> str:
        found = re.search(r"weights +(\w+)", self.end())
        assert found, self.text
        return found[1]


@pytest.fixture
def start(hosts: Hosts, tmp_path: Path, recipe: Config) -> Iterator[Callable[..., Run]]:
    """Starts `distrain train` on a host of the cluster; what is left of it dies with the test."""
    started: list[Run] = []

    def launch(*arguments: str, config: Config = recipe, host: str = HEAD, address: str | None = "auto") -> Run:
        where = () if address is None else (f"--address={address}",)
        return distrain(host, "train", str(written(config)), *where, *arguments)

    def written(config: Config) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(to_yaml(config))
        return path

    def distrain(host: str, *arguments: str, **options: Any) -> Run:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        command = (PYTHON, "-m", "distrain", *arguments)
        started.append(Run(hosts.popen(host, *command, cwd=str(tmp_path), **pipes, **options)))
        return started[-1]

    launch.written, launch.distrain = written, distrain
    yield launch
    for host in hosts.address:
        for pid in hosts.pids(host, "-m distrain "):
            os.kill(pid, signal.SIGKILL)
    for run in started:
        run.process.wait(timeout=10)
        run.join()


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Notes a row for the table of faults."""
    return lambda text: TABLE.append((request.node.name, text))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, text in TABLE:
        terminalreporter.write_line(f"{name}: {text}")
