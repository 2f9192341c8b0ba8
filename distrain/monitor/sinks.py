"""Where the numbers of a run go: a console, and the metrics file of the run directory."""

import json
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from distrain.data.store import Store

_NAME = re.compile(r"metrics-(\d+)\.jsonl")


class Console(Protocol):
    """What a person sees of a run. Each value of a record is a plain number or string."""

    def event(self, text: str) -> None:
        """One line about something that happened."""

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Training starts at `step` of `steps`."""

    def advance(self, step: int) -> None:
        """So many steps are done."""

    def record(self, record: Mapping[str, Any]) -> None:
        """A metrics line: `kind` is train or eval."""

    def stop(self) -> None:
        """Training is over, for whatever reason."""


class Silent:
    """The console of a rank that is not the lead: every rank has the same to tell."""

    def event(self, text: str) -> None:
        """Nothing."""

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Nothing."""

    def advance(self, step: int) -> None:
        """Nothing."""

    def record(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class PlainLines:
    """A console for pipes and log files: one line a record."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._steps = stream, 0

    def event(self, text: str) -> None:
        """Print a line."""
        self._stream.write(text + "\n")
        self._stream.flush()

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Remember the number of steps."""
        self._steps = steps

    def advance(self, step: int) -> None:
        """Nothing: lines come at log steps."""

    def record(self, record: Mapping[str, Any]) -> None:
        """Print a line."""
        self.event(line(record, self._steps))

    def stop(self) -> None:
        """Nothing to put away."""


def line(record: Mapping[str, Any], steps: int) -> str:
    """A record as one line of at most 80 columns."""
    where = f"epoch {record['epoch']}  step {record['step']}/{steps}"
    if record["kind"] == "eval":
        top5 = f"  top-5 {record['top5']:.2%}" if record["classes"] > 5 else ""
        return f"{where}  validation loss {record['loss']:.4f}  top-1 {record['top1']:.2%}{top5}"
    speed = f"{record['images_per_second']:.0f} images/s  waits {record['data_wait']:.0%}"
    return f"{where}  loss {record['loss']:.4f}  top-1 {record['top1']:.1%}  {speed}"


class MetricsFile:
    """`metrics-<attempt>.jsonl`: one JSON object a line, written at once on this machine.

    Objects in a bucket cannot be appended to: there the whole file is uploaded by `upload`.
    """

    def __init__(self, store: Store, attempt: int) -> None:
        self._store, self._name = store, f"metrics-{attempt:03d}.jsonl"
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._file: TextIO | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record; numbers that JSON lacks (NaN, infinity) become null."""
        if self._file is None:
            if self._store.local is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="distrain-")
            folder = self._temporary.name if self._temporary else self._store.local
            assert folder is not None
            self._file = (Path(folder) / self._name).open("a", encoding="utf-8")
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()

    def upload(self) -> None:
        """Bring a run directory in a bucket up to date."""
        if self._temporary:
            self._store.write(self._name, (Path(self._temporary.name) / self._name).read_bytes())

    def close(self) -> None:
        """Upload, and close the file."""
        try:
            self.upload()
        finally:
            if self._file:
                self._file.close()
            if self._temporary:
                self._temporary.cleanup()


def metrics_attempts(store: Store) -> list[int]:
    """Numbers of the attempts that wrote metrics, ascending."""
    return sorted(int(match[1]) for name in store.list() if (match := _NAME.fullmatch(name)))


def read_metrics(store: Store) -> list[dict[str, Any]]:
    """All records of a run by (step, kind); where attempts overlap, the highest attempt's."""
    records: dict[tuple[int, str], dict[str, Any]] = {}
    for attempt in metrics_attempts(store):
        for text in store.read(f"metrics-{attempt:03d}.jsonl").decode().splitlines():
            try:
                record = json.loads(text)
            except ValueError:  # a line cut off by kill -9; the next attempt writes that step again
                continue
            records[record["step"], record["kind"]] = record
    return [records[key] for key in sorted(records)]
