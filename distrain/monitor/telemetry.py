"""Telemetry of the training loop: progress, the time per phase, slow ranks and jumps of the loss."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from distrain.monitor.health import LossSpikeDetector, StragglerDetector, Watchdog
from distrain.monitor.phases import Phase
from distrain.monitor.prometheus import Metrics

T = TypeVar("T")


class Telemetry:
    """The clocks of a training loop, on each rank: between the loop, its watchdog and its metrics."""

    def __init__(
        self,
        metrics: Metrics,
        watchdog: Watchdog,
        steps_per_epoch: int,
        last_logged_step: int,
    ) -> None:
        """Start.

        Args:
            metrics: what is counted, for the metrics page.
            watchdog: ends a rank that makes no progress.
            steps_per_epoch: of the run.
            reached: the highest step that an earlier attempt has logged; steps up to it count as recomputed.
        """
        self.metrics = metrics
        self._watchdog = watchdog
        self._steps_per_epoch = steps_per_epoch
        self._last_logged_step = last_logged_step
        self._straggler_detector = StragglerDetector()
        self._spike_detector = LossSpikeDetector()
        self._data_wait_seconds = (
            0.0  # seconds that lanes waited for data since the last log step
        )
        self._interval_start = time.monotonic()  # the clock at the last log step

    def mark_progress(self, place: str, *, waiting: bool = False) -> None:
        """Tell the watchdog of progress: what comes now, and whether it waits for other ranks."""
        self._watchdog.mark_progress(place, waiting=waiting)

    def time_phase(self, phase: Phase) -> AbstractContextManager[None]:
        """Time the block as a phase of the step; any thread may call it."""
        return self.metrics.time_phase(phase)

    def start_clock(self, queue_depths: Callable[[], Mapping[str, int]]) -> None:
        """Start the clock of the first log step; `depths` gives the lengths of the loader's queues by stage."""
        self.metrics.track_queues(queue_depths)
        self._interval_start = time.monotonic()

    @contextmanager
    def time_accumulation(self) -> Iterator[None]:
        """Time the block as this rank's part of a step before the reduction."""
        before = self._data_wait_seconds
        with self.metrics.time_arrival():
            yield
        self.metrics.add_data_wait(self._data_wait_seconds - before)

    def time_loading(self, step: int, batches: Iterator[T]) -> Iterator[T]:
        """Yield the same micro-batches, and count the time spent waiting for them.

        `Lanes.run` takes them under a lock: one thread at a time is here.
        """
        while True:
            asked = time.monotonic()
            self.mark_progress(f"loading the data of step {step + 1}")
            batch = next(batches, None)
            self._data_wait_seconds += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def count_samples(self, num_samples: int, num_bad: int) -> None:
        """Count the samples of a micro-batch, and those of them that did not decode."""
        self.metrics.increment_counter("samples", num_samples - num_bad, outcome="good")
        self.metrics.increment_counter("samples", num_bad, outcome="bad")

    def count_step(self, steps_done: int) -> None:
        """Count a step: so many of the run are done."""
        self.metrics.count_step(
            steps_done,
            self._steps_per_epoch,
            is_recomputed=steps_done <= self._last_logged_step,
        )

    @property
    def data_wait_seconds(self) -> float:
        """Seconds for which this rank's lanes waited for data since the last log step."""
        return self._data_wait_seconds

    def pop_interval(self) -> tuple[float, float]:
        """Return the seconds since the last log step, and those of them spent waiting for data; start anew."""
        now = time.monotonic()
        seconds, waited = now - self._interval_start, self._data_wait_seconds
        self._interval_start, self._data_wait_seconds = now, 0.0
        return seconds, waited

    def exclude_time(self, seconds: float) -> None:
        """Leave time out of the speed of training: an evaluation took it."""
        self._interval_start += seconds

    def detect_anomalies(
        self,
        loss: float,
        wait_seconds: Sequence[float],
        arrival_seconds: Sequence[float],
    ) -> list[str]:
        """Count a rank that is slow and a loss that jumps, and return what to say of them.

        Args:
            loss: mean since the last log step.
            waits: seconds per step for which each rank waited for data.
            arrivals: seconds per step until each rank came to the reduction, as `Metrics.arrived` has them.
        """
        rank, slow = self._straggler_detector.detect_straggler(
            wait_seconds, arrival_seconds
        )
        if rank is not None:
            self.metrics.increment_counter("straggler_log_steps", slow_rank=str(rank))
        jump = self._spike_detector.detect_spike(loss)
        self.metrics.increment_counter("loss_spikes", int(jump is not None))
        return [sentence for sentence in (slow, jump) if sentence is not None]
