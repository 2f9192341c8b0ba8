"""Outputs of a run: the console, and the metrics file of the run directory."""

import io
import json
import math
from collections.abc import Callable
from typing import Protocol, TextIO, runtime_checkable

from distrain.data.storage.store import Store
from distrain.monitor.records import (
    EvalRecord,
    MetricsRecord,
    record_from_dict,
    record_to_dict,
)
from distrain.rundir import files


@runtime_checkable
class Console(Protocol):
    """Display of a run for its user."""

    def log(self, text: str) -> None:
        """Show one line about an event."""

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Show that training starts at `step` of `steps`."""

    def set_step(self, step: int) -> None:
        """Show that `step` steps of the run are done."""

    def log_metrics(self, record: MetricsRecord) -> None:
        """Show a record of training or of an evaluation."""

    def stop(self) -> None:
        """Show that training is over, for whatever reason."""


class SilentConsole:
    """Console of the ranks other than 0, which would only repeat what rank 0 shows."""

    def log(self, text: str) -> None:
        """Ignore the line."""

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Ignore the start."""

    def set_step(self, step: int) -> None:
        """Ignore the step."""

    def log_metrics(self, record: MetricsRecord) -> None:
        """Ignore the record."""

    def stop(self) -> None:
        """Ignore the end."""


class PlainConsole:
    """Console for pipes and log files: one line per record."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._num_steps = 0

    def log(self, text: str) -> None:
        """Print a line."""
        self._stream.write(text + "\n")
        # Lines are rare, and a reader of the pipe wants them at once.
        self._stream.flush()

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Remember the number of steps."""
        self._num_steps = steps

    def set_step(self, step: int) -> None:
        """Ignore the step: lines come at log steps."""

    def log_metrics(self, record: MetricsRecord) -> None:
        """Print a record as a line."""
        self.log(format_record(record, self._num_steps))

    def stop(self) -> None:
        """Ignore the end: every line has been printed."""


def format_record(record: MetricsRecord, steps: int) -> str:
    """Return a record as one line, usually of at most 80 columns.

    Args:
        record: of training or of an evaluation.
        steps: of the whole run; 0: unknown, since a log is shown from its middle.
    """
    total = f"/{steps}" if steps else ""
    position = f"epoch {record.epoch}  step {record.step}{total}"
    if isinstance(record, EvalRecord):
        # With five classes or fewer, top-5 is always 100 %.
        top5 = f"  top-5 {record.top5:.2%}" if record.classes > 5 else ""
        accuracy = f"top-1 {record.top1:.2%}{top5}"
        return f"{position}  validation loss {record.loss:.4f}  {accuracy}"
    speed = f"{record.images_per_second:.0f} images/s  waits {record.data_wait:.0%}"
    return f"{position}  loss {record.loss:.4f}  top-1 {record.top1:.1%}  {speed}"


class AppendOnlyFile:
    """File of a run directory that grows.

    On a local disk it is appended to at once. Objects in a bucket cannot be appended
    to: there `upload` writes the whole file again. What cannot be written, because the
    disk is full or the bucket does not answer, is kept and written with what follows.
    """

    def __init__(self, store: Store, name: str, warn: Callable[[str], None]) -> None:
        """Prepare the file, without creating it.

        Args:
            store: the run directory.
            name: of the file in it.
            warn: gets a warning when writing fails, once until it succeeds again.
        """
        self._store = store
        self._name = name
        self._warn = warn
        # Not yet written; in a bucket the whole file, which every upload needs.
        self._unwritten = bytearray()
        self._file: io.FileIO | None = None
        self._has_failed = False

    def write(self, data: bytes) -> None:
        """Append data; it does not raise if that fails."""
        self._unwritten += data
        if self._store.local_path is not None:
            self._try_write(self._append_unwritten)

    def upload(self) -> None:
        """Write the whole file to a bucket; on a local disk do nothing."""
        if self._store.local_path is None and self._unwritten:
            self._try_write(
                lambda: self._store.write(self._name, bytes(self._unwritten))
            )

    def close(self) -> None:
        """Write the rest, and close the file."""
        self.upload()
        if self._store.local_path is not None and self._unwritten:
            self._try_write(self._append_unwritten)
        if self._file:
            self._file.close()
        if self._has_failed:
            url = f"{self._store.redacted_url}/{self._name}"
            self._warn(f"warning: the last lines of {url} are lost")

    def _append_unwritten(self) -> None:
        # Open the file at the first write only: an attempt that writes nothing leaves
        # no file. Unbuffered, so that a kill loses nothing.
        if self._file is None:
            path = self._store.resolve_path(self._name)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - see `close`
        # A disk that fills up may take only some of the bytes.
        while self._unwritten:
            num_written = self._file.write(self._unwritten)
            del self._unwritten[:num_written]

    def _try_write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            # Warn once per outage, not at every line.
            if not self._has_failed:
                self._warn(f"warning: {self._name} cannot be written for now: {error}")
            self._has_failed = True
        else:
            self._has_failed = False


class MetricsFile(AppendOnlyFile):
    """File `metrics-<attempt>.jsonl`: one JSON object per line."""

    def __init__(self, store: Store, attempt: int, warn: Callable[[str], None]) -> None:
        """Prepare the file of an attempt; the arguments are as in `AppendOnlyFile`."""
        super().__init__(store, files.metrics_path(attempt), warn)

    def write_record(self, record: MetricsRecord) -> None:
        """Append a record; NaN and infinity, which JSON lacks, become null."""
        values = {
            key: None
            if isinstance(value, float) and not math.isfinite(value)
            else value
            for key, value in record_to_dict(record).items()
        }
        self.write((json.dumps(values) + "\n").encode())


def list_metrics_attempts(store: Store) -> list[int]:
    """Return the numbers of the attempts that wrote metrics, ascending."""
    matches = (files.METRICS_PATTERN.fullmatch(name) for name in store.list_names())
    return sorted(int(match[1]) for match in matches if match)


def read_metrics(store: Store) -> list[MetricsRecord]:
    """Return all records of a run, by step and kind.

    Where attempts overlap, the record of the highest attempt counts.
    """
    records: dict[tuple[int, str], MetricsRecord] = {}
    for attempt in list_metrics_attempts(store):
        for line in store.read(files.metrics_path(attempt)).decode().splitlines():
            # Skip a line that kill -9 has cut off (the next attempt writes that step
            # again), and lines of other programs.
            try:
                record = record_from_dict(json.loads(line))
            except (ValueError, KeyError):
                continue
            records[record.step, record.kind] = record
    return [records[key] for key in sorted(records)]
