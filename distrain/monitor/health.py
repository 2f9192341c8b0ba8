"""A watch on a rank's own progress: what hangs is named, with every thread's stack, and ended."""

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress

# A rank that waits for others gets more time than one that waits for nobody, so that the one that hangs is found first.
_WAITING = 1.25
_EXIT = 70  # EX_SOFTWARE of sysexits.h


class Watchdog:
    """Ends the process when `at` is not called for a while. Close it, or use it in a `with`."""

    def __init__(self, limit: float, report: Callable[[str, str], None]) -> None:
        """Start to watch.

        Args:
            limit: seconds without progress.
            report: gets a sentence on where it hangs and the stacks of all threads; it may hang itself.
        """
        self._limit, self._report = limit, report
        self._place, self._since, self._allowed = "the start", time.monotonic(), limit
        self._closing = threading.Event()
        self._arm(2 * limit)
        self._thread = threading.Thread(target=self._watch, name="distrain-watchdog", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    @property
    def idle(self) -> float:
        """Seconds since the last progress."""
        return time.monotonic() - self._since

    def at(self, place: str, *, waiting: bool = False) -> None:
        """Progress was made: what comes now, and whether it waits for other ranks."""
        self._place, self._since = place, time.monotonic()
        self._allowed = self._limit * (_WAITING if waiting else 1.0)

    def _watch(self) -> None:
        pause = min(1.0, self._limit / 10)
        while not self._closing.wait(pause):
            self._arm(2 * self._limit)
            if time.monotonic() - self._since > self._allowed:
                self._end()

    def _arm(self, seconds: float) -> None:
        """If a call holds the interpreter's lock the watching thread stands still too: then C code ends the process."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)

    def _end(self) -> None:
        self._arm(2 * self._limit + 15.0)
        sentence = f"no progress for {self._allowed:.0f} s in {self._place}"
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read().decode()
        reporter = threading.Thread(target=self._try_to_report, args=(sentence, stacks), daemon=True)
        reporter.start()
        reporter.join(10.0)
        os._exit(_EXIT)  # a thread that hangs cannot be ended in any other way

    def _try_to_report(self, sentence: str, stacks: str) -> None:
        with suppress(Exception):  # what hangs may be what the report needs
            self._report(sentence, stacks)


def group_timeout(limit: float) -> float:
    """Seconds after which a collective gives up: after a watchdog of any rank would have spoken."""
    return _WAITING * limit + 15.0
