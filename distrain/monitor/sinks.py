"""Where the numbers of a run go: a console, and the metrics file of the run directory."""

import io
import json
import math
from collections.abc import Callable
from typing import Protocol, TextIO

from distrain.data.storage.store import Store
from distrain.monitor.records import EvalRecord, MetricsRecord, from_tree, to_tree
from distrain.rundir import files


class Console(Protocol):
    """Show a run to a person."""

    def event(self, text: str) -> None:
        """One line about something that happened."""

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Training starts at `step` of `steps`."""

    def advance(self, step: int) -> None:
        """So many steps are done."""

    def record(self, record: MetricsRecord) -> None:
        """A record of training or of an evaluation."""

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

    def record(self, record: MetricsRecord) -> None:
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

    def record(self, record: MetricsRecord) -> None:
        """Print a line."""
        self.event(line(record, self._steps))

    def stop(self) -> None:
        """Nothing to put away."""


def line(record: MetricsRecord, steps: int) -> str:
    """A record as one line of at most 80 columns."""
    where = f"epoch {record.epoch}  step {record.step}/{steps}"
    if isinstance(record, EvalRecord):
        top5 = f"  top-5 {record.top5:.2%}" if record.classes > 5 else ""
        return (
            f"{where}  validation loss {record.loss:.4f}  top-1 {record.top1:.2%}{top5}"
        )
    speed = f"{record.images_per_second:.0f} images/s  waits {record.data_wait:.0%}"
    return f"{where}  loss {record.loss:.4f}  top-1 {record.top1:.1%}  {speed}"


class GrowingFile:
    """A file of a run directory that grows. On this machine it is appended to at once.

    Objects in a bucket cannot be appended to: there the whole file is uploaded by `upload`. What cannot be written,
    because the disk is full or the bucket does not answer, is kept and written with what follows.
    """

    def __init__(self, store: Store, name: str, tell: Callable[[str], None]) -> None:
        """Nothing is written yet; `tell` gets a warning when that fails."""
        self._store, self._name, self._tell = store, name, tell
        self._data = bytearray()
        """What is not yet written; of a bucket, the whole file."""
        self._file: io.FileIO | None = None
        self._behind = False

    def write(self, data: bytes) -> None:
        """Append."""
        self._data += data
        if self._store.local is not None:
            self._try(self._append)

    def upload(self) -> None:
        """Bring a run directory in a bucket up to date."""
        if self._store.local is None and self._data:
            self._try(lambda: self._store.write(self._name, bytes(self._data)))

    def close(self) -> None:
        """Write what is not yet written, and close the file."""
        self.upload()
        if self._store.local is not None and self._data:
            self._try(self._append)
        if self._file:
            self._file.close()
        if self._behind:
            self._tell(
                f"warning: the last lines of {self._store.name}/{self._name} are lost"
            )

    def _append(self) -> None:
        if self._file is None:
            self._file = open(self._store.path(self._name), "ab", buffering=0)  # noqa: SIM115 - closed by `close`
        while self._data:
            del self._data[: self._file.write(self._data)]

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self._behind:
                self._tell(f"warning: {self._name} cannot be written for now: {error}")
            self._behind = True
        else:
            self._behind = False


class MetricsFile(GrowingFile):
    """`metrics-<attempt>.jsonl`: one JSON object a line."""

    def __init__(self, store: Store, attempt: int, tell: Callable[[str], None]) -> None:
        """Nothing is written yet; `tell` gets a warning when that fails."""
        super().__init__(store, files.metrics(attempt), tell)

    def record(self, record: MetricsRecord) -> None:
        """Append a record; numbers that JSON lacks (NaN, infinity) become null."""
        plain = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in to_tree(record).items()
        }
        self.write((json.dumps(plain) + "\n").encode())


def metrics_attempts(store: Store) -> list[int]:
    """Numbers of the attempts that wrote metrics, ascending."""
    return sorted(
        int(match[1])
        for name in store.list()
        if (match := files.METRICS_NAME.fullmatch(name))
    )


def read_metrics(store: Store) -> list[MetricsRecord]:
    """All records of a run by (step, kind); where attempts overlap, the highest attempt's."""
    records: dict[tuple[int, str], MetricsRecord] = {}
    for attempt in metrics_attempts(store):
        for text in store.read(files.metrics(attempt)).decode().splitlines():
            try:
                record = from_tree(json.loads(text))
            except (
                ValueError,
                KeyError,
            ):  # cut off by kill -9, the next attempt writes that step again; or not ours
                continue
            records[record.step, record.kind] = record
    return [records[key] for key in sorted(records)]
