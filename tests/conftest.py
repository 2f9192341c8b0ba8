"""Shared fixtures. The digits are packed once a session; models are narrow unless a test says otherwise."""

import http.server
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from forks import Fork
from hypothesis import settings
from narrow import narrow_recipe
from sets import SetWriter

from distrain.cli.main import main
from distrain.config import Config
from distrain.data.decoding.image import encode_jpeg
from distrain.data.prepare.digits import pack_digits
from distrain.data.shards.dataset import Dataset
from distrain.data.shards.stats import PixelMoments
from distrain.data.storage.store import Store
from distrain.monitor.records import EvalRecord, MetricsRecord
from distrain.trainer import train

# No test asserts a time, and none leaves anything in the checkout.
settings.register_profile("distrain", deadline=None, database=None)
settings.load_profile("distrain")


class Recorder:
    """A console that remembers."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.records: list[MetricsRecord] = []

    def log(self, text: str) -> None:
        self.events.append(text)

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        self.events.append(f"start {step}/{steps}")

    def set_step(self, step: int) -> None:
        self.step = step

    def log_metrics(self, record: MetricsRecord) -> None:
        self.records.append(record)

    def stop(self) -> None:
        self.events.append("stop")


@pytest.fixture
def console() -> Recorder:
    return Recorder()


class Calls:
    """Stands in for functions of torch's that need a GPU: remembers what they were asked, in order."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []
        """Name and arguments of each call."""

    def noting(self, name: str, answer: Any = None) -> Callable[..., Any]:
        """A function that notes its calls under a name."""

        def call(*arguments: Any, **options: Any) -> Any:
            self.made.append((name, *arguments, *options.values()))
            return answer

        return call

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.made]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The calls to torch.cuda.set_device, and to what else a test replaces by `noting`."""
    calls = Calls()
    monkeypatch.setattr(torch.cuda, "set_device", calls.noting("set_device"))
    return calls


@pytest.fixture
def distrain(monkeypatch, capsys):
    """Runs `distrain ARGS` in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["distrain", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        code = caught.value.code
        return 0 if code is None else code, out, err

    return call


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[Callable[[], None]]]:
    """Inside, files of this process do not grow past so many bytes; what it gives makes room again.

    pytest itself writes to files between a test and its clean-up, so this is no fixture that lasts until then.
    """

    @contextmanager
    def limit(size: int) -> Iterator[Callable[[], None]]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

        def make_room() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield make_room
        finally:
            make_room()

    return limit


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train` (1,438 images of 72 x 72) and `val` (359)."""
    folder = tmp_path_factory.mktemp("digits")
    pack_digits(str(folder / "train"), str(folder / "val"))
    return folder


@pytest.fixture(scope="session")
def few_digits(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first 320 images of `digits/train`, 5 steps of 64, and the first 80 of `digits/val`."""
    folder = tmp_path_factory.mktemp("few-digits")
    for name, num_rows in (("train", 320), ("val", 80)):
        dataset = Dataset.open(digits / name)
        whole = dataset.manifest
        writer = SetWriter(
            Store(str(folder / name)),
            whole.classes,
            whole.image_size,
            encoding=whole.encoding,
            proved=whole.verified,
            group_rows=32,
        )
        for i in range(num_rows):
            writer.add(bytes(dataset[i].data), dataset[i].label, f"{i}.png")
        writer.finish(whole.statistics)
    return folder


class TrainedRun(NamedTuple):
    """A run that has been trained, and what it reported of its validation."""

    run: Path
    records: list[EvalRecord]


@pytest.fixture(scope="session")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A run of two epochs on the digits, evaluated after each: better than chance, and far from perfect."""
    run = tmp_path_factory.mktemp("trained") / "run"
    config = narrow_recipe(
        digits,
        run,
        epochs=2,
        model={"name": "alexnet", "width": 0.04, "dropout": 0.0},
        optimizer={"name": "adam"},
        schedule={"name": "constant", "lr": 0.005},
        data={"val": str(digits / "val")},
        evaluate={"batch": 50},
        checkpoint={"keep": 5},
    )
    console = Recorder()
    train(config, console=console)
    return TrainedRun(run, [r for r in console.records if isinstance(r, EvalRecord)])


@pytest.fixture
def damaged_set() -> Callable[..., None]:
    """Writes a set of 72 x 72 noise, some of whose files are junk: (folder, bad ids, number of classes, rows)."""

    def write(folder: Path, bad: set[int], classes: int = 3, rows: int = 40) -> None:
        rng, moments = np.random.default_rng(0), PixelMoments()
        writer = SetWriter(
            Store(str(folder)), [str(c) for c in range(classes)], (72, 72), group_rows=8
        )
        for i in range(rows):
            pixels = rng.integers(0, 256, (72, 72, 3), dtype=np.uint8)
            moments.add_image(pixels)
            writer.add(
                b"junk" if i in bad else encode_jpeg(pixels, 90),
                i % classes,
                f"{i}.jpg",
            )
        writer.finish(moments.to_statistics())

    return write


@pytest.fixture
def narrow(digits: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes configs of a short run of a narrow model on the digits; keywords replace whole top-level keys."""
    return partial(narrow_recipe, digits, tmp_path / "run")


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A proxy that the environment names in every way: it refuses, and records what it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def refuse(self) -> None:
            asked.append(self.path)
            self.send_error(403)

        do_GET = do_POST = do_CONNECT = refuse  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        url = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv(name, url)
        monkeypatch.setenv(name.upper(), url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield asked
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def plain_environment() -> dict[str, str]:
    """The environment for a subprocess: Python may keep compiled modules, and is killed with its test."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


@pytest.fixture
def command(
    tmp_path: Path, plain_environment: dict[str, str]
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `distrain ARGS` as a process of its own, which the test's end kills."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(
            [sys.executable, "-m", "distrain", *arguments],
            text=True,
            env=plain_environment,
            cwd=tmp_path,
            **{**streams, **options},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def forked(tmp_path: Path) -> Iterator[Callable[..., Fork]]:
    """Starts `distrain ARGS` as `command` does, some CPU seconds cheaper: from a process that has loaded torch."""
    started: list[Fork] = []

    def start(*arguments: str) -> Fork:
        out = tmp_path / f"command-{len(started)}.out"
        process = Fork("one_command", str(tmp_path), *arguments, out=out)
        started.append(process)
        return process

    yield start
    for process in started:
        process.end()


def pytest_configure() -> None:
    """A shell starts what it puts into the background with SIGINT ignored: what tests start would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where DISTRAIN_NO_SKIPS is set, as in CI, a skipped test fails the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if (
        os.environ.get("DISTRAIN_NO_SKIPS")
        and reporter is not None
        and reporter.stats.get("skipped")
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
