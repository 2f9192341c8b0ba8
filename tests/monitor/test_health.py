import subprocess
import sys
import time

import pytest

from distrain.monitor.health import Watchdog, group_timeout

HANGS = """
import sys, time
from distrain.monitor.health import Watchdog

def report(sentence, stacks):
    print(sentence); print(stacks, flush=True)
    if sys.argv[2:] == ["report"]:
        time.sleep(3600)

def stuck_here():
    {how}

with Watchdog(float(sys.argv[1]), report) as watchdog:
    watchdog.at("the test")
    stuck_here()
"""


def run(how, *arguments):
    command = [sys.executable, "-c", HANGS.format(how=how), *arguments]
    return subprocess.run(command, text=True, capture_output=True, timeout=60, check=False)


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
            watchdog.at(f"step {i}", waiting=i % 2 == 0)
            time.sleep(0.1)  # twice the limit in all


def test_a_collective_waits_longer_than_a_rank_that_waits_for_nobody():
    assert group_timeout(60) > 1.25 * 60
