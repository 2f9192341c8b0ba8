"""Watch over a run: end a rank that hangs, report slow ranks and spikes of the loss."""

import faulthandler
import os
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

# A rank that waits for others gets more time than one that does not, so that the rank
# that hangs is the first to be reported.
_WAITING_FACTOR = 1.25
# EX_SOFTWARE of sysexits.h.
_EXIT_CODE = 70
# A straggler reaches the all-reduce at least so much later than the median rank.
_STRAGGLER_RATIO = 1.25
# ... and at least so many seconds per step: less is noise of the system's scheduler.
_STRAGGLER_SECONDS = 0.01
# Seconds before a warning about the same rank is repeated.
_REPEAT_WARNING_SECONDS = 600.0
# A loss spike is a loss of at least so many times the median of so many losses before.
_SPIKE_WINDOW = 20
_SPIKE_RATIO = 2.0
# Seconds that a rank that hangs has for its report, before it is ended without one.
_REPORT_TIMEOUT_SECONDS = 10.0


class Watchdog:
    """Thread that ends the process if `mark_progress` is not called for a while.

    Use it in a `with`.
    """

    def __init__(self, timeout: float, on_hang: Callable[[str, str], None]) -> None:
        """Start to watch.

        Args:
            timeout: seconds without progress after which the process ends.
            on_hang: gets a sentence that says where the process hangs, and the stacks
                of all threads. It may hang itself.
        """
        self._timeout = timeout
        self._on_hang = on_hang
        self._place = "the start"
        self._last_progress = time.monotonic()
        self._current_timeout = timeout
        self._closing = threading.Event()
        self._arm_faulthandler(2 * timeout)
        self._thread = threading.Thread(
            target=self._watch_progress, name="distrain-watchdog", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        # First the thread, which would arm the faulthandler again.
        self._closing.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last progress."""
        return time.monotonic() - self._last_progress

    def mark_progress(self, place: str, *, waiting: bool = False) -> None:
        """Record progress.

        Args:
            place: what comes now, to name it if it hangs.
            waiting: it waits for other ranks, which gives it more time.
        """
        self._place = place
        self._last_progress = time.monotonic()
        self._current_timeout = self._timeout * (_WAITING_FACTOR if waiting else 1.0)

    def _watch_progress(self) -> None:
        pause = min(1.0, self._timeout / 10)
        while not self._closing.wait(pause):
            self._arm_faulthandler(2 * self._timeout)
            if time.monotonic() - self._last_progress > self._current_timeout:
                self._abort_process()

    def _arm_faulthandler(self, seconds: float) -> None:
        """Let C code end the process in `seconds`, unless it is armed again before.

        A call that holds the interpreter's lock also stops the watching thread; only a
        thread of C code still runs then.
        """
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)

    def _abort_process(self) -> None:
        # The last resort, if this thread hangs too: later than the report may take.
        self._arm_faulthandler(2 * self._timeout + 1.5 * _REPORT_TIMEOUT_SECONDS)
        sentence = f"no progress for {self._current_timeout:.0f} s in {self._place}"
        # faulthandler writes to a file descriptor only.
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read().decode()
        # Report on another thread: the report may hang for the same reason.
        reporter = threading.Thread(
            target=self._try_to_report, args=(sentence, stacks), daemon=True
        )
        reporter.start()
        reporter.join(_REPORT_TIMEOUT_SECONDS)
        # A thread that hangs cannot be ended in any other way.
        os._exit(_EXIT_CODE)

    def _try_to_report(self, sentence: str, stacks: str) -> None:
        # The report may need just what is broken.
        with suppress(Exception):
            self._on_hang(sentence, stacks)


def group_timeout(watchdog_timeout: float) -> float:
    """Return the seconds after which a collective gives up.

    They are more than any rank's watchdog waits, so that the watchdog of the rank that
    hangs reports first.
    """
    return _WAITING_FACTOR * watchdog_timeout + 15.0


class StragglerDetector:
    """Detector of the rank that the others wait for."""

    def __init__(self) -> None:
        # Time of the last warning by rank.
        self._last_warned: dict[int, float] = {}

    def detect_straggler(
        self, wait_seconds: Sequence[float], arrival_seconds: Sequence[float]
    ) -> tuple[int | None, str | None]:
        """Find the slow rank of the last steps, if there is one.

        Args:
            wait_seconds: seconds per step for which each rank waited for data.
            arrival_seconds: seconds per step until each rank reached the all-reduce,
                waiting for data included; 0 if no step was timed. The time of backward
                says nothing: on a machine that ranks share it is as long for all.

        Returns:
            The slow rank, and a sentence about it unless there was one a while ago.
        """
        # A straggler is late compared with the median rank (the lower one of two).
        num_ranks = len(arrival_seconds)
        slowest = max(range(num_ranks), key=lambda rank: arrival_seconds[rank])
        arrival = arrival_seconds[slowest]
        median = sorted(arrival_seconds)[(num_ranks - 1) // 2]
        is_late = arrival >= _STRAGGLER_RATIO * median
        if num_ranks == 1 or not is_late or arrival - median < _STRAGGLER_SECONDS:
            return None, None

        # Warn about the same rank once in a while only.
        now = time.monotonic()
        last_warned = self._last_warned.get(slowest, -_REPEAT_WARNING_SECONDS)
        if now - last_warned < _REPEAT_WARNING_SECONDS:
            return slowest, None
        self._last_warned[slowest] = now

        waiting_ratio = min(1.0, wait_seconds[slowest] / arrival)
        cause = "data loading is not the cause"
        if waiting_ratio > 0.1:
            cause = f"{waiting_ratio:.0%} of it waiting for data"
        return slowest, (
            f"rank {slowest} is slow: it reaches the all-reduce after "
            f"{1000 * arrival:.0f} ms per step, {cause}; the median rank after "
            f"{1000 * median:.0f} ms"
        )


class LossSpikeDetector:
    """Detector of a loss that jumps."""

    def __init__(self) -> None:
        self._recent_losses: deque[float] = deque(maxlen=_SPIKE_WINDOW)

    def detect_spike(self, loss: float) -> str | None:
        """Compare a loss with those before, and add it to them.

        Args:
            loss: mean since the last log step.

        Returns:
            A sentence, if the loss is at least twice the median of the last 20; None
            otherwise, and while there are fewer of them.
        """
        median = None
        if len(self._recent_losses) == _SPIKE_WINDOW:
            median = statistics.median(self._recent_losses)
        self._recent_losses.append(loss)
        if median is None or loss < _SPIKE_RATIO * median:
            return None
        return f"loss spike: {loss:.4g} (recent median {median:.4g})"
