"""Timer of the phases of training steps, on the CPU and on a GPU."""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from distrain.monitor.phases import Phase

ARRIVAL_SPAN = "arrival"
"""Span from the start of a step until this rank reaches its all-reduce.

It is not a phase: it covers several of them.
"""
# Spans that a GPU works through after the thread that launched them has moved on.
_DEVICE_SPANS = (
    Phase.TRANSFER,
    Phase.FORWARD,
    Phase.BACKWARD,
    Phase.REDUCTION,
    Phase.OPTIMIZER,
    ARRIVAL_SPAN,
)
# On a GPU one step of eleven is timed and counts for all of them, because events cost
# time on the thread that launches kernels. Eleven, because log steps are rarely eleven
# apart: the step after a log step finds the GPU without work and takes longer.
_TIMED_STEP_INTERVAL = 11
_FIRST_TIMED_STEP = 5
# Name that marks the end of a step among the recorded spans.
_STEP_END = ""


class SpanTime(NamedTuple):
    """Time of a span in one step, summed over threads."""

    name: str
    seconds: float
    num_steps: int
    """Steps that the time counts for: 1, or more where only some steps are timed."""


class PhaseTimer:
    """Timer of the spans of steps, on any thread of a rank."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        # Name, start and end; both are seconds, or events of a GPU.
        self._spans: list[tuple[str, Any, Any]] = []
        self._num_steps = 0

    @contextmanager
    def time_span(self, name: Phase | str) -> Iterator[None]:
        """Time the block as a phase of the step, or as `ARRIVAL_SPAN`.

        On a GPU the work is timed there, by events, in one step of eleven.
        """
        on_device = self._device.type == "cuda" and name in _DEVICE_SPANS
        if on_device and self._num_steps % _TIMED_STEP_INTERVAL != _FIRST_TIMED_STEP:
            yield
            return
        read_clock = self._record_cuda_event if on_device else time.perf_counter
        start = read_clock()
        try:
            yield
        finally:
            end = read_clock()
            with self._lock:
                self._spans.append((name, start, end))

    def end_step(self) -> None:
        """Mark the end of a step: the spans up to here are its own."""
        with self._lock:
            self._spans.append((_STEP_END, None, None))
        self._num_steps += 1

    def pop_times(self) -> Iterator[SpanTime]:
        """Yield the times of the spans since the last call, step by step.

        On a GPU this is a sync point: it reads events.
        """
        with self._lock:
            spans = self._spans
            self._spans = []
        seconds: Counter[str] = Counter()
        for name, start, end in spans:
            if name == _STEP_END:
                yield from self._to_span_times(seconds, in_whole_step=True)
                seconds.clear()
            elif isinstance(start, float):
                seconds[name] += end - start
            else:
                # Events give milliseconds.
                seconds[name] += start.elapsed_time(end) / 1000
        # Spans after the last whole step, such as those of a final checkpoint.
        yield from self._to_span_times(seconds, in_whole_step=False)

    def _to_span_times(
        self, seconds: Mapping[str, float], *, in_whole_step: bool
    ) -> Iterator[SpanTime]:
        for name, span_seconds in seconds.items():
            is_sampled = (
                in_whole_step and self._device.type == "cuda" and name in _DEVICE_SPANS
            )
            num_steps = _TIMED_STEP_INTERVAL if is_sampled else 1
            yield SpanTime(name, span_seconds, num_steps)

    def _record_cuda_event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # On this rank's GPU, whichever is the current one of this thread.
        event.record(torch.cuda.current_stream(self._device))
        return event
