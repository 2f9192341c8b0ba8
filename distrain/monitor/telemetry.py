"""Telemetry of the training loop: progress, the time per phase, slow ranks and jumps of the loss."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from distrain.monitor.health import Spikes, Stragglers, Watchdog
from distrain.monitor.phases import Phase
from distrain.monitor.prometheus import Metrics

T = TypeVar("T")


class Telemetry:
    """The clocks of a training loop, on each rank: between the loop, its watchdog and its metrics."""

    def __init__(
        self, metrics: Metrics, watchdog: Watchdog, steps_per_epoch: int, reached: int
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
        self._reached = reached
        self._stragglers = Stragglers()
        self._spikes = Spikes()
        self._waited = 0.0  # seconds that lanes waited for data since the last log step
        self._logged = time.monotonic()  # the clock at the last log step

    def at(self, place: str, *, waiting: bool = False) -> None:
        """Tell the watchdog of progress: what comes now, and whether it waits for other ranks."""
        self._watchdog.at(place, waiting=waiting)

    def phase(self, phase: Phase) -> AbstractContextManager[None]:
        """Time the block as a phase of the step; any thread may call it."""
        return self.metrics.phase(phase)

    def start(self, depths: Callable[[], Mapping[str, int]]) -> None:
        """Start the clock of the first log step; `depths` gives the lengths of the loader's queues by stage."""
        self.metrics.queues(depths)
        self._logged = time.monotonic()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Time the block as this rank's part of a step before the reduction."""
        before = self._waited
        with self.metrics.arriving():
            yield
        self.metrics.waited(self._waited - before)

    def loading(self, step: int, batches: Iterator[T]) -> Iterator[T]:
        """Yield the same micro-batches, and count the time spent waiting for them.

        `Lanes.run` takes them under a lock: one thread at a time is here.
        """
        while True:
            asked = time.monotonic()
            self.at(f"loading the data of step {step + 1}")
            batch = next(batches, None)
            self._waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def computed(self, samples: int, bad: int) -> None:
        """Count the samples of a micro-batch, and those of them that did not decode."""
        self.metrics.add("samples", samples - bad, outcome="good")
        self.metrics.add("samples", bad, outcome="bad")

    def stepped(self, done: int) -> None:
        """Count a step: so many of the run are done."""
        self.metrics.step(done, self._steps_per_epoch, again=done <= self._reached)

    @property
    def waited(self) -> float:
        """Seconds for which this rank's lanes waited for data since the last log step."""
        return self._waited

    def take_interval(self) -> tuple[float, float]:
        """Return the seconds since the last log step, and those of them spent waiting for data; start anew."""
        now = time.monotonic()
        seconds, waited = now - self._logged, self._waited
        self._logged, self._waited = now, 0.0
        return seconds, waited

    def leave_out(self, seconds: float) -> None:
        """Leave time out of the speed of training: an evaluation took it."""
        self._logged += seconds

    def warnings(
        self, loss: float, waits: Sequence[float], arrivals: Sequence[float]
    ) -> list[str]:
        """Count a rank that is slow and a loss that jumps, and return what to say of them.

        Args:
            loss: mean since the last log step.
            waits: seconds per step for which each rank waited for data.
            arrivals: seconds per step until each rank came to the reduction, as `Metrics.arrived` has them.
        """
        rank, slow = self._stragglers.judge(waits, arrivals)
        if rank is not None:
            self.metrics.add("straggler_log_steps", slow_rank=str(rank))
        jump = self._spikes.judge(loss)
        self.metrics.add("loss_spikes", int(jump is not None))
        return [sentence for sentence in (slow, jump) if sentence is not None]
