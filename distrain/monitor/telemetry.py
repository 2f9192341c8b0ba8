"""Telemetry of the training loop: progress, time per phase, slow ranks, loss spikes."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from distrain.monitor.health import LossSpikeDetector, StragglerDetector, Watchdog
from distrain.monitor.phases import Phase
from distrain.monitor.prometheus import Metrics

T = TypeVar("T")


class Telemetry:
    """Clocks and counts of a rank's training loop, for its watchdog and its metrics."""

    def __init__(
        self,
        metrics: Metrics,
        watchdog: Watchdog,
        steps_per_epoch: int,
        last_logged_step: int,
    ) -> None:
        """Start.

        Args:
            metrics: gets the counts and times, for the metrics page.
            watchdog: ends the rank if it makes no progress.
            steps_per_epoch: of the run.
            last_logged_step: the highest step that an earlier attempt has logged; steps
                up to it count as recomputed.
        """
        self.metrics = metrics
        self._watchdog = watchdog
        self._steps_per_epoch = steps_per_epoch
        self._last_logged_step = last_logged_step
        self._straggler_detector = StragglerDetector()
        self._spike_detector = LossSpikeDetector()
        # Both since the last log step.
        self._data_wait_seconds = 0.0
        self._interval_start = time.monotonic()

    def mark_progress(self, place: str, *, waiting: bool = False) -> None:
        """Report progress to the watchdog.

        Args:
            place: what comes now.
            waiting: it waits for other ranks.
        """
        self._watchdog.mark_progress(place, waiting=waiting)

    def time_phase(self, phase: Phase) -> AbstractContextManager[None]:
        """Time the block as a phase of the step; any thread may call it."""
        return self.metrics.time_phase(phase)

    def start_clock(self, queue_depths: Callable[[], Mapping[str, int]]) -> None:
        """Start the first log interval; show the loader's queue lengths from now on.

        Args:
            queue_depths: returns the lengths of the loader's queues by stage.
        """
        self.metrics.track_queues(queue_depths)
        self._interval_start = time.monotonic()

    @contextmanager
    def time_accumulation(self) -> Iterator[None]:
        """Time the block as this rank's work in a step before the all-reduce."""
        wait_before = self._data_wait_seconds
        with self.metrics.time_arrival():
            yield
        self.metrics.add_data_wait(self._data_wait_seconds - wait_before)

    def time_loading(self, step: int, batches: Iterator[T]) -> Iterator[T]:
        """Yield the same micro-batches, and count the time spent waiting for them.

        Args:
            step: number of the step, from 0.
            batches: the micro-batches of the step.
        """
        # The lane pool takes micro-batches under a lock: one thread at a time is here,
        # and the sum below needs no lock of its own.
        while True:
            wait_start = time.monotonic()
            self.mark_progress(f"loading the data of step {step + 1}")
            batch = next(batches, None)
            self._data_wait_seconds += time.monotonic() - wait_start
            if batch is None:
                return
            yield batch

    def count_samples(self, num_samples: int, num_bad: int) -> None:
        """Count the samples of a micro-batch.

        Args:
            num_samples: all of them.
            num_bad: those that could not be decoded.
        """
        self.metrics.increment_counter("samples", num_samples - num_bad, outcome="good")
        self.metrics.increment_counter("samples", num_bad, outcome="bad")

    def count_step(self, steps_done: int) -> None:
        """Count a step, after which `steps_done` steps of the run are done."""
        self.metrics.count_step(
            steps_done,
            self._steps_per_epoch,
            is_recomputed=steps_done <= self._last_logged_step,
        )

    @property
    def data_wait_seconds(self) -> float:
        """Seconds since the last log step in which a lane waited for data.

        Other lanes may have computed meanwhile.
        """
        return self._data_wait_seconds

    def pop_interval(self) -> tuple[float, float]:
        """Return the seconds since the last log step, and start anew.

        Returns:
            All of these seconds, and those of them spent waiting for data.
        """
        now = time.monotonic()
        seconds = now - self._interval_start
        data_wait_seconds = self._data_wait_seconds
        self._interval_start = now
        self._data_wait_seconds = 0.0
        return seconds, data_wait_seconds

    def exclude_time(self, seconds: float) -> None:
        """Leave an evaluation out of the interval, and so out of images per second.

        Args:
            seconds: duration of the evaluation.
        """
        self._interval_start += seconds

    def detect_anomalies(
        self,
        loss: float,
        wait_seconds: Sequence[float],
        arrival_seconds: Sequence[float],
    ) -> list[str]:
        """Count a slow rank and a loss spike, and return a sentence about each.

        Args:
            loss: mean since the last log step.
            wait_seconds: seconds per step for which each rank waited for data.
            arrival_seconds: seconds per step until each rank reached the all-reduce, as
                `Metrics.pop_mean_arrival_seconds` returns them.
        """
        slow_rank, slow_sentence = self._straggler_detector.detect_straggler(
            wait_seconds, arrival_seconds
        )
        # Count a slow rank at each log step, even if it is not reported again.
        if slow_rank is not None:
            self.metrics.increment_counter(
                "straggler_log_steps", slow_rank=str(slow_rank)
            )
        spike_sentence = self._spike_detector.detect_spike(loss)
        self.metrics.increment_counter("loss_spikes", int(spike_sentence is not None))
        sentences = (slow_sentence, spike_sentence)
        return [sentence for sentence in sentences if sentence is not None]
