import subprocess
import sys
import time

import pytest

import distrain.monitor.health
from distrain.monitor.health import (
    LossSpikeDetector,
    StragglerDetector,
    Watchdog,
    group_timeout,
)

HANGS = """
import sys, time
from distrain.monitor import health
from distrain.monitor.health import Watchdog

health._REPORT_TIMEOUT_SECONDS = 1.0

def report(sentence, stacks):
    print(sentence); print(stacks, flush=True)
    if sys.argv[2:] == ["report"]:
        time.sleep(3600)

def stuck_here():
    {how}

with Watchdog(float(sys.argv[1]), report) as watchdog:
    watchdog.mark_progress("the test")
    stuck_here()
"""


def run(how, *arguments):
    command = [sys.executable, "-c", HANGS.format(how=how), *arguments]
    return subprocess.run(
        command, text=True, capture_output=True, timeout=60, check=False
    )


def test_what_hangs_is_named_and_ended():
    done = run("time.sleep(3600)", "0.5")
    assert done.returncode == 70
    assert done.stdout.startswith("no progress for 0 s in the test\n")
    assert "in stuck_here" in done.stdout


def test_a_report_that_hangs_too_is_not_waited_for_long():
    done = run("time.sleep(3600)", "0.5", "report")
    assert done.returncode == 70
    assert "in stuck_here" in done.stdout


def test_code_that_keeps_the_interpreter_is_ended_as_well():
    """A regular expression that backtracks for ages holds the lock: no Python thread runs."""
    done = run("import re; re.match('(a*)*b', 'a' * 60)", "1.5")
    assert done.returncode == 1
    assert "in stuck_here" in done.stderr


def test_progress_keeps_it_alive():
    with Watchdog(0.6, pytest.fail) as watchdog:
        for i in range(12):
            watchdog.mark_progress(f"step {i}", waiting=i % 2 == 0)
            time.sleep(0.1)  # twice the limit in all


def test_a_collective_waits_longer_than_a_rank_that_waits_for_nobody():
    assert group_timeout(60) > 1.25 * 60


def test_the_slow_rank_is_named_once_in_a_while(monkeypatch):
    stragglers = StragglerDetector()
    rank, sentence = stragglers.detect_straggler([0.1, 0.01, 0.9], [1.0, 1.05, 2.0])
    assert rank == 2
    assert sentence == (
        "rank 2 is slow: it reaches the all-reduce after 2000 ms per step, "
        "45% of it waiting for data; the median rank after 1050 ms"
    )
    assert stragglers.detect_straggler([0.1, 0.01, 0.9], [1.0, 1.05, 2.0]) == (
        2,
        None,
    ), "not at every log step"
    assert stragglers.detect_straggler([0.0, 0.0, 0.0], [3.0, 1.05, 0.9])[1].startswith(
        "rank 0 is slow: "
    )
    monkeypatch.setattr(distrain.monitor.health, "_REPEAT_WARNING_SECONDS", 0.0)
    assert (
        "data loading is not the cause"
        in stragglers.detect_straggler([0.0, 0.0, 0.05], [1.0, 1.05, 2.0])[1]
    )


@pytest.mark.parametrize(
    "arrivals",
    [
        [1.0],
        [1.0, 1.2],
        [1.0, 1.0, 1.0],
        [1.2, 1.0, 1.1],
        [0.0, 0.0],
        [0.015, 0.024],  # of small steps: less than the system's scheduler takes
    ],
)
def test_ranks_that_are_alike_are_not_named(arrivals):
    assert StragglerDetector().detect_straggler([0.0] * len(arrivals), arrivals) == (
        None,
        None,
    )


def test_of_two_ranks_the_later_one_is_slow():
    assert StragglerDetector().detect_straggler([0.0, 0.0], [1.0, 1.3])[0] == 1


def test_a_loss_that_jumps():
    spikes = LossSpikeDetector()
    assert not any(spikes.detect_spike(7 * 0.95**i) for i in range(60)), (
        "falling is no jump"
    )
    usual = 7 * 0.95**59
    assert not any(spikes.detect_spike(usual) for _ in range(20))
    assert spikes.detect_spike(1.3 * usual) is None
    assert spikes.detect_spike(3 * usual).startswith("loss spike: ")
    assert spikes.detect_spike(usual) is None


def test_a_first_loss_is_no_jump():
    spikes = LossSpikeDetector()
    assert spikes.detect_spike(1.0) is None
    assert spikes.detect_spike(100.0) is None
