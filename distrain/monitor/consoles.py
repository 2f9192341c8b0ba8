"""Consoles for programs and files: JSON lines for another process, and a log file."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, TextIO

from distrain.data.storage.store import Store
from distrain.errors import RunError
from distrain.monitor.records import MetricsRecord, record_from_dict, record_to_dict
from distrain.monitor.sinks import AppendOnlyFile, Console, format_record
from distrain.rundir import files

# The key that marks a line of JSON as a call of a console.
_CALL_KEY = "distrain"
# Seconds between two uploads of a log to a bucket.
_UPLOAD_INTERVAL_SECONDS = 30.0


class JsonConsole:
    """Console that writes each call as a line of JSON, for `replay_line`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def log(self, text: str) -> None:
        """Write a line of text."""
        self._write_call("event", text=text)

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Write that training starts at `step` of `steps`."""
        self._write_call(
            "start", step=step, steps=steps, steps_per_epoch=steps_per_epoch
        )

    def set_step(self, step: int) -> None:
        """Ignore the step: one line per step would be too many."""

    def log_metrics(self, record: MetricsRecord) -> None:
        """Write a metrics record."""
        self._write_call("record", record=record_to_dict(record))

    def stop(self) -> None:
        """Write that training is over."""
        self._write_call("stop")

    def _write_call(self, call: str, **arguments: Any) -> None:
        self._stream.write(json.dumps({_CALL_KEY: call, **arguments}) + "\n")
        # The reader shows progress live, so no line may wait in a buffer.
        self._stream.flush()


def replay_line(text: str, console: Console) -> None:
    """Repeat on a console the call that a line of `JsonConsole` holds.

    Any other line is logged as it is: one of a traceback, one that was cut off, or one
    of a newer version of distrain.
    """
    try:
        call = _parse_call(json.loads(text), console)
    except (ValueError, LookupError, TypeError):
        call = partial(console.log, text)
    # Outside the `try`: an error of the console itself is the caller's.
    call()


def _parse_call(line: Any, console: Console) -> Callable[[], None]:
    """Return the call of a console that a line of JSON holds.

    Raises:
        ValueError, LookupError, TypeError: it is not such a line.
    """
    name = line[_CALL_KEY]
    if name == "event":
        return partial(console.log, line["text"])
    if name == "start":
        return partial(
            console.start,
            step=line["step"],
            steps=line["steps"],
            steps_per_epoch=line["steps_per_epoch"],
        )
    if name == "record":
        return partial(_show_record, console, record_from_dict(line["record"]))
    if name == "stop":
        return console.stop
    raise ValueError(f"a console has no call {name!r}")


def _show_record(console: Console, record: MetricsRecord) -> None:
    # Steps are not written, so the position comes from the record.
    console.set_step(record.step)
    console.log_metrics(record)


class LogFileConsole:
    """Console that shows all on another one and keeps it in the run directory.

    The lines go to `log-<time>.txt` once training has started. Until then they are held
    in memory, because the run directory may still belong to another attempt.
    """

    def __init__(self, console: Console, store: Store) -> None:
        self._console = console
        self._store = store
        # Another thread logs the first Ctrl-C.
        self._lock = threading.Lock()
        timestamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        self._file_name = files.log_path(timestamp)
        self._log_file: AppendOnlyFile | None = None
        # Lines from before training, for the log file.
        self._unwritten = bytearray()
        self._num_steps = 0
        self._last_upload = 0.0

    def __enter__(self) -> "LogFileConsole":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        # Keep the reason in the file: the caller shows it on its own console only.
        if error is not None:
            text = str(error)
            self._append_line(
                f"error: {text}" if text else f"ended by {type(error).__name__}"
            )
        if self._log_file is not None:
            self._log_file.close()

    def log(self, text: str) -> None:
        """Show a line of text and keep it. Raises RunError if nobody reads it."""
        with _explain_closed_pipe():
            self._console.log(text)
        self._append_line(text)

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Open the log file: from now on this attempt owns the run directory."""
        self._console.start(step=step, steps=steps, steps_per_epoch=steps_per_epoch)
        self._num_steps = steps
        with self._lock:
            # A run that resumes after the loss of a rank starts again, with the same
            # file.
            if self._log_file is None:
                self._log_file = AppendOnlyFile(
                    self._store, self._file_name, self._console.log
                )
                self._log_file.write(bytes(self._unwritten))

    def set_step(self, step: int) -> None:
        """Show the number of steps done; the file does not get it."""
        self._console.set_step(step)

    def log_metrics(self, record: MetricsRecord) -> None:
        """Show a metrics record and keep it as a line of text.

        Raises RunError if nobody reads it.
        """
        with _explain_closed_pipe():
            self._console.log_metrics(record)
        self._append_line(format_record(record, self._num_steps))

    def stop(self) -> None:
        """Stop the console; the file stays open for lines that follow."""
        self._console.stop()

    def _append_line(self, text: str) -> None:
        timestamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = f"{timestamp} {text}\n".encode()
        with self._lock:
            if self._log_file is None:
                self._unwritten += line
                return
            self._log_file.write(line)
            # An upload sends the whole file again, so it must not follow every line.
            if time.monotonic() - self._last_upload > _UPLOAD_INTERVAL_SECONDS:
                self._last_upload = time.monotonic()
                self._log_file.upload()


@contextmanager
def _explain_closed_pipe() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise RunError(
            "the reader of the output has ended (a closed pipe, as after `| head`), "
            "and with it the run: run the same command to resume"
        ) from None
