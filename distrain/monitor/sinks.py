"""Where the numbers of a run go: a console, and the metrics file of the run directory."""

import io
import json
import math
from collections.abc import Callable
from typing import Protocol, TextIO

from distrain.data.storage.store import Store
from distrain.monitor.records import (
    EvalRecord,
    MetricsRecord,
    record_from_dict,
    record_to_dict,
)
from distrain.rundir import files


class Console(Protocol):
    """Show a run to a person."""

    def log(self, text: str) -> None:
        """One line about something that happened."""

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Training starts at `step` of `steps`."""

    def set_step(self, step: int) -> None:
        """So many steps are done."""

    def log_metrics(self, record: MetricsRecord) -> None:
        """A record of training or of an evaluation."""

    def stop(self) -> None:
        """Training is over, for whatever reason."""


class SilentConsole:
    """The console of a rank that is not the lead: every rank has the same to tell."""

    def log(self, text: str) -> None:
        """Nothing."""

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Nothing."""

    def set_step(self, step: int) -> None:
        """Nothing."""

    def log_metrics(self, record: MetricsRecord) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class PlainConsole:
    """A console for pipes and log files: one line a record."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._num_steps = stream, 0

    def log(self, text: str) -> None:
        """Print a line."""
        self._stream.write(text + "\n")
        self._stream.flush()

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Remember the number of steps."""
        self._num_steps = steps

    def set_step(self, step: int) -> None:
        """Nothing: lines come at log steps."""

    def log_metrics(self, record: MetricsRecord) -> None:
        """Print a line."""
        self.log(format_record(record, self._num_steps))

    def stop(self) -> None:
        """Nothing to put away."""


def format_record(record: MetricsRecord, steps: int) -> str:
    """A record as one line of at most 80 columns."""
    where = f"epoch {record.epoch}  step {record.step}/{steps}"
    if isinstance(record, EvalRecord):
        top5 = f"  top-5 {record.top5:.2%}" if record.classes > 5 else ""
        return (
            f"{where}  validation loss {record.loss:.4f}  top-1 {record.top1:.2%}{top5}"
        )
    speed = f"{record.images_per_second:.0f} images/s  waits {record.data_wait:.0%}"
    return f"{where}  loss {record.loss:.4f}  top-1 {record.top1:.1%}  {speed}"


class AppendOnlyFile:
    """A file of a run directory that grows. On this machine it is appended to at once.

    Objects in a bucket cannot be appended to: there the whole file is uploaded by `upload`. What cannot be written,
    because the disk is full or the bucket does not answer, is kept and written with what follows.
    """

    def __init__(self, store: Store, name: str, warn: Callable[[str], None]) -> None:
        """Nothing is written yet; `tell` gets a warning when that fails."""
        self._store, self._name, self._warn = store, name, warn
        self._unwritten = bytearray()
        """What is not yet written; of a bucket, the whole file."""
        self._file: io.FileIO | None = None
        self._has_failed = False

    def write(self, data: bytes) -> None:
        """Append."""
        self._unwritten += data
        if self._store.local_path is not None:
            self._try_write(self._append_unwritten)

    def upload(self) -> None:
        """Bring a run directory in a bucket up to date."""
        if self._store.local_path is None and self._unwritten:
            self._try_write(
                lambda: self._store.write(self._name, bytes(self._unwritten))
            )

    def close(self) -> None:
        """Write what is not yet written, and close the file."""
        self.upload()
        if self._store.local_path is not None and self._unwritten:
            self._try_write(self._append_unwritten)
        if self._file:
            self._file.close()
        if self._has_failed:
            self._warn(
                f"warning: the last lines of {self._store.redacted_url}/{self._name} are lost"
            )

    def _append_unwritten(self) -> None:
        if self._file is None:
            self._file = open(self._store.resolve_path(self._name), "ab", buffering=0)  # noqa: SIM115 - closed by `close`
        while self._unwritten:
            del self._unwritten[: self._file.write(self._unwritten)]

    def _try_write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self._has_failed:
                self._warn(f"warning: {self._name} cannot be written for now: {error}")
            self._has_failed = True
        else:
            self._has_failed = False


class MetricsFile(AppendOnlyFile):
    """`metrics-<attempt>.jsonl`: one JSON object a line."""

    def __init__(self, store: Store, attempt: int, warn: Callable[[str], None]) -> None:
        """Nothing is written yet; `tell` gets a warning when that fails."""
        super().__init__(store, files.metrics_path(attempt), warn)

    def write_record(self, record: MetricsRecord) -> None:
        """Append a record; numbers that JSON lacks (NaN, infinity) become null."""
        plain = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record_to_dict(record).items()
        }
        self.write((json.dumps(plain) + "\n").encode())


def list_metrics_attempts(store: Store) -> list[int]:
    """Numbers of the attempts that wrote metrics, ascending."""
    return sorted(
        int(match[1])
        for name in store.list_names()
        if (match := files.METRICS_PATTERN.fullmatch(name))
    )


def read_metrics(store: Store) -> list[MetricsRecord]:
    """All records of a run by (step, kind); where attempts overlap, the highest attempt's."""
    records: dict[tuple[int, str], MetricsRecord] = {}
    for attempt in list_metrics_attempts(store):
        for text in store.read(files.metrics_path(attempt)).decode().splitlines():
            try:
                record = record_from_dict(json.loads(text))
            except (
                ValueError,
                KeyError,
            ):  # cut off by kill -9, the next attempt writes that step again; or not ours
                continue
            records[record.step, record.kind] = record
    return [records[key] for key in sorted(records)]
