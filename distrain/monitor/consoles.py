"""Consoles beside those that a person looks at: one for another process, one that keeps a log in the run directory."""

import json
import time
from types import TracebackType
from typing import Any, TextIO

from distrain.data.storage.store import Store
from distrain.monitor.records import MetricsRecord, record_from_dict, record_to_dict
from distrain.monitor.sinks import AppendOnlyFile, Console, format_record
from distrain.rundir import files

_CALL_KEY = "distrain"
# Seconds between two uploads of a log to a bucket.
_UPLOAD_INTERVAL_SECONDS = 30.0


class JsonConsole:
    """Writes each call as a line of JSON, for `replay` elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def log(self, text: str) -> None:
        """A line of text."""
        self._write_call("event", text=text)

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Training starts."""
        self._write_call(
            "start", step=step, steps=steps, steps_per_epoch=steps_per_epoch
        )

    def set_step(self, step: int) -> None:
        """Nothing: a line a step would be too many."""

    def log_metrics(self, record: MetricsRecord) -> None:
        """A metrics record."""
        self._write_call("record", record=record_to_dict(record))

    def stop(self) -> None:
        """Training is over."""
        self._write_call("stop")

    def _write_call(self, call: str, **arguments: Any) -> None:
        self._stream.write(json.dumps({_CALL_KEY: call, **arguments}) + "\n")
        self._stream.flush()


def replay_line(text: str, console: Console) -> None:
    """Do on a console what a line of `JsonLines` says; any other line is an event."""
    try:
        arguments = json.loads(text)
        call = arguments.pop(_CALL_KEY)
    except (ValueError, KeyError, AttributeError, TypeError):
        console.log(text)
        return
    if call == "record":
        record = record_from_dict(arguments["record"])
        console.set_step(record.step)
        console.log_metrics(record)
        return
    if call == "event":
        console.log(**arguments)
        return
    getattr(console, call)(**arguments)


class LogFileConsole:
    """A console whose lines stay in `log-<time>.txt` of the run directory, from when training has started there."""

    def __init__(self, console: Console, store: Store) -> None:
        self._console, self._num_steps, self._unwritten = console, 0, bytearray()
        self._file_name, self._store = (
            files.log_path(time.strftime("%Y%m%d-%H%M%S", time.gmtime())),
            store,
        )
        self._log_file: AppendOnlyFile | None = None
        self._last_upload = 0.0

    def __enter__(self) -> "LogFileConsole":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        if error is not None:
            self._append_line(
                f"error: {error}" if str(error) else f"ended by {type(error).__name__}"
            )
        if self._log_file is not None:
            self._log_file.close()

    def log(self, text: str) -> None:
        """A line of text."""
        self._console.log(text)
        self._append_line(text)

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Training starts: the run directory is ours."""
        self._console.start(step=step, steps=steps, steps_per_epoch=steps_per_epoch)
        self._num_steps = steps
        if self._log_file is None:
            self._log_file = AppendOnlyFile(
                self._store, self._file_name, self._console.log
            )
            self._log_file.write(bytes(self._unwritten))

    def set_step(self, step: int) -> None:
        """So many steps are done."""
        self._console.set_step(step)

    def log_metrics(self, record: MetricsRecord) -> None:
        """A metrics line."""
        self._console.log_metrics(record)
        self._append_line(format_record(record, self._num_steps))

    def stop(self) -> None:
        """Training is over."""
        self._console.stop()

    def _append_line(self, text: str) -> None:
        data = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}\n".encode()
        if self._log_file is None:
            self._unwritten += data
            return
        self._log_file.write(data)
        if time.monotonic() - self._last_upload > _UPLOAD_INTERVAL_SECONDS:
            self._last_upload = time.monotonic()
            self._log_file.upload()
