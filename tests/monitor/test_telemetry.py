"""The clocks of a training loop, on a clock that stands until it is told to move."""

from types import SimpleNamespace

import pytest
import torch

import distrain.monitor.telemetry
from distrain.distributed.world import World
from distrain.monitor.config import MetricsConfig as Page
from distrain.monitor.health import Watchdog
from distrain.monitor.phases import Phase
from distrain.monitor.prometheus import Metrics
from distrain.monitor.telemetry import Telemetry


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(distrain.monitor.telemetry, "time", found)
    return found


@pytest.fixture
def telemetry(clock):
    metrics = Metrics(Page(port=None), "run", World(torch.device("cpu")), print)
    with Watchdog(600.0, lambda *_: None) as watchdog:
        yield SimpleNamespace(
            it=Telemetry(metrics, watchdog, steps_per_epoch=5, last_logged_step=2),
            watchdog=watchdog,
        )
    metrics.close(final=True)


@pytest.fixture
def numbers(telemetry):
    """What the page has of a metric, by its labels beside `run`."""

    def find(name, *labels):
        families = {family.name: family for family in telemetry.it.metrics.collect()}
        samples = families[f"distrain_{name}"].samples
        return {
            tuple(s.labels[label] for label in labels): s.value
            for s in samples
            if not s.name.endswith("_created")
        }

    return find


def slow_batches(clock, *seconds):
    for i, each in enumerate(seconds):
        clock.now += each
        yield i


def test_the_time_that_batches_are_waited_for_counts_until_the_next_log_step(
    telemetry, clock, numbers
):
    it = telemetry.it
    it.start_clock(lambda: {"ready": 2})
    for step in range(2):
        with it.time_accumulation():
            for _ in it.time_loading(step, slow_batches(clock, 1.0, 2.0)):
                clock.now += 10.0  # computing
    assert it.data_wait_seconds == 6.0
    assert numbers("queue_depth", "stage") == {("ready",): 2.0}
    assert numbers("rank_data_wait_seconds", "rank") == {("0",): 6.0}
    assert it.pop_interval() == (46.0, 6.0)
    clock.now += 7.0
    it.exclude_time(3.0)  # an evaluation
    assert it.pop_interval() == (4.0, 0.0)


def test_loading_is_progress(telemetry, clock):
    next(telemetry.it.time_loading(6, iter("a")))
    assert telemetry.watchdog._place == "loading the data of step 7"


def test_steps_that_an_earlier_attempt_had_done_are_recomputed(telemetry, numbers):
    for done in (1, 2, 3):
        telemetry.it.count_step(done)
    assert numbers("steps") == {(): 3.0}
    assert numbers("steps_recomputed") == {(): 2.0}
    assert numbers("epoch") == {(): 3 / 5}


def test_a_slow_rank_and_a_loss_that_jumps_are_counted_and_said(telemetry, numbers):
    it = telemetry.it
    for _ in range(20):
        assert it.detect_anomalies(1.0, [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]) == []
    slow, jump = it.detect_anomalies(3.0, [0.0, 0.9, 0.0], [1.0, 2.0, 1.0])
    assert "rank 1 is slow" in slow
    assert "loss spike: 3" in jump
    assert len(it.detect_anomalies(1.0, [0.0, 0.9, 0.0], [1.0, 2.0, 1.0])) == 0, (
        "it was said a moment ago"
    )
    assert numbers("straggler_log_steps", "slow_rank") == {("1",): 2.0}
    assert numbers("loss_spikes") == {(): 1.0}


def test_each_phase_has_its_label(telemetry):
    for phase in Phase:
        with telemetry.it.time_phase(phase):
            pass
    telemetry.it.metrics.record_timings()
    histogram = telemetry.it.metrics._histograms["phase_seconds"]
    counted = {
        s.labels["phase"] for family in histogram.collect() for s in family.samples
    }
    assert counted == {
        "data_wait", "transfer", "forward", "backward", "reduction", "optimizer", "checkpoint",
    }  # fmt: skip
