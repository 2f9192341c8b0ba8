"""A watch on a run: a rank that hangs is named and ended; one that is slow, and a loss that jumps, are named."""

import faulthandler
import os
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

# A rank that waits for others gets more time than one that waits for nobody, so that the one that hangs is found first.
_WAITING = 1.25
_EXIT = 70  # EX_SOFTWARE of sysexits.h
# How much later than the middle rank a straggler comes to the reduction.
_LATE = 1.25
_AGAIN_AFTER = 600.0
_LOSSES, _JUMP = 20, 2.0
# Seconds for the last words of a rank that hangs.
_REPORTING = 10.0


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
        self._thread = threading.Thread(
            target=self._watch, name="distrain-watchdog", daemon=True
        )
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
        self._arm(2 * self._limit + 1.5 * _REPORTING)
        sentence = f"no progress for {self._allowed:.0f} s in {self._place}"
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read().decode()
        reporter = threading.Thread(
            target=self._try_to_report, args=(sentence, stacks), daemon=True
        )
        reporter.start()
        reporter.join(_REPORTING)
        os._exit(_EXIT)  # a thread that hangs cannot be ended in any other way

    def _try_to_report(self, sentence: str, stacks: str) -> None:
        with suppress(Exception):  # what hangs may be what the report needs
            self._report(sentence, stacks)


def group_timeout(limit: float) -> float:
    """Seconds after which a collective gives up: after a watchdog of any rank would have spoken."""
    return _WAITING * limit + 15.0


class Stragglers:
    """Names the rank that the others wait for."""

    def __init__(self) -> None:
        self._told: dict[int, float] = {}

    def judge(
        self, waits: Sequence[float], arrivals: Sequence[float]
    ) -> tuple[int | None, str | None]:
        """Look at the last steps.

        Args:
            waits: seconds per step for which each rank waited for data.
            arrivals: seconds per step until each rank came to the reduction, waiting included; 0 where no step was
                timed. How long its backward took says nothing: the others' is as long when they share a slow machine.

        Returns:
            The slow rank, and a sentence if there was none on it for a while.
        """
        slowest = max(range(len(arrivals)), key=lambda rank: arrivals[rank])
        middle = sorted(arrivals)[(len(arrivals) - 1) // 2]
        if (
            len(arrivals) == 1
            or not arrivals[slowest]
            or arrivals[slowest] < _LATE * middle
        ):
            return None, None
        now = time.monotonic()
        if now - self._told.get(slowest, -_AGAIN_AFTER) < _AGAIN_AFTER:
            return slowest, None
        self._told[slowest] = now
        share = min(1.0, waits[slowest] / arrivals[slowest])
        why = (
            f"{share:.0%} of it waiting for data"
            if share > 0.1
            else "not for want of data"
        )
        return slowest, (
            f"rank {slowest} is slow: it comes to the reduction after {arrivals[slowest]:.2f} s a step, "
            f"{why}; the middle rank after {middle:.2f} s"
        )


class Spikes:
    """Names a loss that jumps."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_LOSSES)

    def judge(self, loss: float) -> str | None:
        """Look at the mean loss since the last log step; a sentence if it is twice the median of those before."""
        usual = (
            statistics.median(self._losses) if len(self._losses) == _LOSSES else None
        )
        self._losses.append(loss)
        if usual is None or loss < _JUMP * usual:
            return None
        return f"the loss jumps: {loss:.4g}, and {usual:.4g} was usual"
