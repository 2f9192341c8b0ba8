"""Shared by groups that train: configs, the digits, a quiet console, other processes."""

import fcntl
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import DATA, DRY, TMP

from distrain.config import Config, parse_config
from distrain.data.prepare.digits import pack_digits
from distrain.distributed.world import World
from distrain.monitor.records import MetricsRecord


def config(**changes: Any) -> Config:
    """Make a config of the default recipe; keywords replace whole top-level keys."""
    tree: dict[str, Any] = {
        "data": {"train": str(DATA / "packed")},
        "schedule": {"name": "constant", "lr": 0.01},
        "metrics": {"port": None},
        "device": "cpu" if DRY else "cuda",
    }
    return parse_config({**tree, **changes}, "sheet")


def digits() -> Path:
    """Return a folder with `train` and `val`, which the first group that asks makes."""
    folder = TMP / "digits"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            pack_digits(str(folder / "train"), str(folder / "val"))
            (folder / "done").touch()
    return folder


class Quiet:
    """A console that keeps the records, and can stop the run after some seconds or at a step."""

    def __init__(
        self,
        world: World | None = None,
        seconds: float | None = None,
        stop_at: int | None = None,
    ) -> None:
        """`world`: that of the run to stop."""
        self.records: list[MetricsRecord] = []
        self._world = world
        self._seconds = seconds
        self._stop_at = stop_at
        self._end: float | None = None

    def log(self, text: str) -> None:
        """Ignore it."""

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Start the clock."""
        if self._seconds is not None:
            self._end = time.monotonic() + self._seconds

    def set_step(self, step: int) -> None:
        """Stop the run if it is time to."""
        is_late = self._end is not None and time.monotonic() > self._end
        if self._world is not None and (is_late or step == self._stop_at):
            self._world.stop_requested.set()

    def log_metrics(self, record: MetricsRecord) -> None:
        """Keep it."""
        self.records.append(record)

    def stop(self) -> None:
        """Do nothing."""


def run(command: Sequence[str], seconds: float) -> tuple[int, str]:
    """Run a command and return its exit code and what it printed.

    Raises:
        subprocess.TimeoutExpired: it took longer than `seconds`, and was killed; with what it printed.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        text, _ = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired as expired:
        process.kill()
        expired.output = process.communicate()[0]
        raise
    return process.returncode, text
