"""Consoles beside those that a person looks at: one for another process, one that keeps a log in the run directory."""

import json
import time
from types import TracebackType
from typing import Any, TextIO

from distrain.data.storage.store import Store
from distrain.monitor.records import MetricsRecord, from_tree, to_tree
from distrain.monitor.sinks import Console, GrowingFile, line
from distrain.rundir import files

_KEY = "distrain"
# Seconds between two uploads of a log to a bucket.
_UPLOAD_EVERY = 30.0


class JsonLines:
    """Writes each call as a line of JSON, for `replay` elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def event(self, text: str) -> None:
        """A line of text."""
        self._write("event", text=text)

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Training starts."""
        self._write("start", step=step, steps=steps, steps_per_epoch=steps_per_epoch)

    def advance(self, step: int) -> None:
        """Nothing: a line a step would be too many."""

    def record(self, record: MetricsRecord) -> None:
        """A metrics record."""
        self._write("record", record=to_tree(record))

    def stop(self) -> None:
        """Training is over."""
        self._write("stop")

    def _write(self, call: str, **arguments: Any) -> None:
        self._stream.write(json.dumps({_KEY: call, **arguments}) + "\n")
        self._stream.flush()


def replay(text: str, console: Console) -> None:
    """Do on a console what a line of `JsonLines` says; any other line is an event."""
    try:
        arguments = json.loads(text)
        call = arguments.pop(_KEY)
    except (ValueError, KeyError, AttributeError, TypeError):
        console.event(text)
        return
    if call == "record":
        record = from_tree(arguments["record"])
        console.advance(record.step)
        console.record(record)
        return
    getattr(console, call)(**arguments)


class Logged:
    """A console whose lines stay in `log-<time>.txt` of the run directory, from when training has started there."""

    def __init__(self, console: Console, store: Store) -> None:
        self._console, self._steps, self._before = console, 0, bytearray()
        self._name, self._store = (
            files.log(time.strftime("%Y%m%d-%H%M%S", time.gmtime())),
            store,
        )
        self._file: GrowingFile | None = None
        self._uploaded = 0.0

    def __enter__(self) -> "Logged":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        if error is not None:
            self._keep(
                f"error: {error}" if str(error) else f"ended by {type(error).__name__}"
            )
        if self._file is not None:
            self._file.close()

    def event(self, text: str) -> None:
        """A line of text."""
        self._console.event(text)
        self._keep(text)

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Training starts: the run directory is ours."""
        self._console.start(step=step, steps=steps, steps_per_epoch=steps_per_epoch)
        self._steps = steps
        if self._file is None:
            self._file = GrowingFile(self._store, self._name, self._console.event)
            self._file.write(bytes(self._before))

    def advance(self, step: int) -> None:
        """So many steps are done."""
        self._console.advance(step)

    def record(self, record: MetricsRecord) -> None:
        """A metrics line."""
        self._console.record(record)
        self._keep(line(record, self._steps))

    def stop(self) -> None:
        """Training is over."""
        self._console.stop()

    def _keep(self, text: str) -> None:
        data = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}\n".encode()
        if self._file is None:
            self._before += data
            return
        self._file.write(data)
        if time.monotonic() - self._uploaded > _UPLOAD_EVERY:
            self._uploaded = time.monotonic()
            self._file.upload()
