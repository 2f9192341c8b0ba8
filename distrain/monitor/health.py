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
_WAITING_FACTOR = 1.25
_EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
# How much later than the middle rank a straggler comes to the reduction.
_STRAGGLER_RATIO = 1.25
_REPEAT_WARNING_SECONDS = 600.0
_SPIKE_WINDOW, _SPIKE_RATIO = 20, 2.0
# Seconds for the last words of a rank that hangs.
_REPORT_TIMEOUT_SECONDS = 10.0


class Watchdog:
    """Ends the process when `at` is not called for a while. Close it, or use it in a `with`."""

    def __init__(self, timeout: float, on_hang: Callable[[str, str], None]) -> None:
        """Start to watch.

        Args:
            limit: seconds without progress.
            report: gets a sentence on where it hangs and the stacks of all threads; it may hang itself.
        """
        self._timeout, self._on_hang = timeout, on_hang
        self._place, self._last_progress, self._current_timeout = (
            "the start",
            time.monotonic(),
            timeout,
        )
        self._closing = threading.Event()
        self._arm_faulthandler(2 * timeout)
        self._thread = threading.Thread(
            target=self._watch_progress, name="distrain-watchdog", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last progress."""
        return time.monotonic() - self._last_progress

    def mark_progress(self, place: str, *, waiting: bool = False) -> None:
        """Progress was made: what comes now, and whether it waits for other ranks."""
        self._place, self._last_progress = place, time.monotonic()
        self._current_timeout = self._timeout * (_WAITING_FACTOR if waiting else 1.0)

    def _watch_progress(self) -> None:
        pause = min(1.0, self._timeout / 10)
        while not self._closing.wait(pause):
            self._arm_faulthandler(2 * self._timeout)
            if time.monotonic() - self._last_progress > self._current_timeout:
                self._abort_process()

    def _arm_faulthandler(self, seconds: float) -> None:
        """If a call holds the interpreter's lock the watching thread stands still too: then C code ends the process."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)

    def _abort_process(self) -> None:
        self._arm_faulthandler(2 * self._timeout + 1.5 * _REPORT_TIMEOUT_SECONDS)
        sentence = f"no progress for {self._current_timeout:.0f} s in {self._place}"
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read().decode()
        reporter = threading.Thread(
            target=self._try_to_report, args=(sentence, stacks), daemon=True
        )
        reporter.start()
        reporter.join(_REPORT_TIMEOUT_SECONDS)
        os._exit(_EXIT_CODE)  # a thread that hangs cannot be ended in any other way

    def _try_to_report(self, sentence: str, stacks: str) -> None:
        with suppress(Exception):  # what hangs may be what the report needs
            self._on_hang(sentence, stacks)


def group_timeout(watchdog_timeout: float) -> float:
    """Seconds after which a collective gives up: after a watchdog of any rank would have spoken."""
    return _WAITING_FACTOR * watchdog_timeout + 15.0


class StragglerDetector:
    """Names the rank that the others wait for."""

    def __init__(self) -> None:
        self._last_warned: dict[int, float] = {}

    def detect_straggler(
        self, wait_seconds: Sequence[float], arrival_seconds: Sequence[float]
    ) -> tuple[int | None, str | None]:
        """Look at the last steps.

        Args:
            waits: seconds per step for which each rank waited for data.
            arrivals: seconds per step until each rank came to the reduction, waiting included; 0 where no step was
                timed. How long its backward took says nothing: the others' is as long when they share a slow machine.

        Returns:
            The slow rank, and a sentence if there was none on it for a while.
        """
        slowest = max(
            range(len(arrival_seconds)), key=lambda rank: arrival_seconds[rank]
        )
        middle = sorted(arrival_seconds)[(len(arrival_seconds) - 1) // 2]
        if (
            len(arrival_seconds) == 1
            or not arrival_seconds[slowest]
            or arrival_seconds[slowest] < _STRAGGLER_RATIO * middle
        ):
            return None, None
        now = time.monotonic()
        if (
            now - self._last_warned.get(slowest, -_REPEAT_WARNING_SECONDS)
            < _REPEAT_WARNING_SECONDS
        ):
            return slowest, None
        self._last_warned[slowest] = now
        share = min(1.0, wait_seconds[slowest] / arrival_seconds[slowest])
        why = (
            f"{share:.0%} of it waiting for data"
            if share > 0.1
            else "not for want of data"
        )
        return slowest, (
            f"rank {slowest} is slow: it comes to the reduction after {arrival_seconds[slowest]:.2f} s a step, "
            f"{why}; the middle rank after {middle:.2f} s"
        )


class LossSpikeDetector:
    """Names a loss that jumps."""

    def __init__(self) -> None:
        self._recent_losses: deque[float] = deque(maxlen=_SPIKE_WINDOW)

    def detect_spike(self, loss: float) -> str | None:
        """Look at the mean loss since the last log step; a sentence if it is twice the median of those before."""
        usual = (
            statistics.median(self._recent_losses)
            if len(self._recent_losses) == _SPIKE_WINDOW
            else None
        )
        self._recent_losses.append(loss)
        if usual is None or loss < _SPIKE_RATIO * usual:
            return None
        return f"the loss jumps: {loss:.4g}, and {usual:.4g} was usual"
