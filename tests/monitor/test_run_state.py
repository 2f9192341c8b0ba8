"""What a run directory shows of a run: whether it is running, and how it ended."""

import json
import os
import time

import pytest
import torch

from distrain.data.storage.store import Store
from distrain.distributed.world import World
from distrain.errors import RunError
from distrain.monitor.consoles import LogFileConsole
from distrain.monitor.run_state import read_run_state
from distrain.monitor.top import RunWatcher, find_problems, render_lines
from distrain.rundir.lease import acquire_lease
from distrain.trainer import train


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


def state(store):
    return read_run_state(store, time.time())


def change_record(store, **changes):
    record = json.loads(store.read("attempts/001.json"))
    store.write("attempts/001.json", json.dumps({**record, **changes}).encode())


def end_attempt(store, console, error=None, *, starts=True):
    """An attempt as the command runs it: the lease ends before the log."""
    with (
        LogFileConsole(console, store) as log,
        acquire_lease(store, "s", log.log) as lease,
    ):
        lease.record_start(3, 1)
        if starts:
            log.start(step=3, steps=10, steps_per_epoch=5)
        if error is not None:
            raise error


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, "finished"),
        ({"stops": True}, "stopped after step 1 of 22"),
        (
            {"schedule": {"name": "constant", "lr": 1e12}},
            "diverged: see not-finite-step-00000002.json",
        ),
    ],
)
def test_how_a_run_ended(narrow, console, change, wanted):
    change = {"log": {"every": 1}, "checkpoint": {"every": 1}, **change}
    stops = change.pop("stops", False)
    config = narrow(**change)
    world = World(torch.device("cpu"))
    if stops:
        world.stop_requested.set()
    store = Store(config.run)
    try:
        with LogFileConsole(console, store) as log:
            train(config, world, log)
    except RunError:
        assert wanted.startswith("diverged")
    assert state(store) == (wanted, True)
    # Once more, without a log: a finished run stays finished.
    if wanted == "finished":
        assert train(config, world, console).status == "already finished"
        assert state(store) == (wanted, True)
    assert list(render_lines(RunWatcher(config.run).refresh_view(), 80))[1] == wanted


def test_the_error_that_ended_a_run_is_shown(store, console):
    assert state(store) == ("not started", False)
    with pytest.raises(OSError, match="No space"):
        end_attempt(store, console, OSError(28, "No space left"))
    assert state(store) == ("failed: [Errno 28] No space left", True)


def test_the_error_of_an_earlier_attempt_is_not_shown(store, console):
    with pytest.raises(OSError, match="No space"):
        end_attempt(store, console, OSError(28, "No space left"))
    # Older by more than a file system's clock may be coarse.
    (log,) = (name for name in store.list_names() if name.startswith("log-"))
    os.utime(store.resolve_path(log), (0, time.time() - 60))
    with pytest.raises(RunError):
        end_attempt(store, console, RunError("before training"), starts=False)
    assert state(store) == ("failed", True)


def test_a_divergence_without_a_log(store, console):
    """As of `train` in Python. The evidence of an attempt before step 3 does not count."""
    with pytest.raises(RunError):
        end_attempt(store, console, RunError("diverged"), starts=False)
    store.write("not-finite-step-00000002.json", b"{}")
    assert state(store) == ("failed", True)
    store.write("not-finite-step-00000007.json", b"{}")
    assert state(store) == ("diverged: see not-finite-step-00000007.json", True)


def test_an_end_without_a_log(store, console):
    end_attempt(store, console, starts=False)
    assert state(store) == ("ended without an error", True)


def test_a_run_that_is_running_killed_or_silent(store, console):
    store.write("config.yaml", b"")
    store.write("targets.json", b'[{"targets": ["127.0.0.1:1"]}]')
    with acquire_lease(store, "s", print) as lease:
        running = state(store)
        assert running.text.startswith("running: attempt 1, ")
        assert f"process {os.getpid()}, since " in running.text
        view = RunWatcher(store.url).refresh_view()
        assert find_problems(view, 0.0) == [
            "http://127.0.0.1:1/metrics does not answer"
        ]

        # The process of another start time is dead.
        identity = json.loads(store.read("attempts/001.json"))["process"]
        change_record(store, process=f"{identity}1")
        killed = state(store)
        assert killed.text.startswith("killed: attempt 1, ")
        assert killed.has_ended
        view = RunWatcher(store.url).refresh_view()
        assert find_problems(view, 0.0) == [], "its page need not answer"

        # Of another machine, only the time of the last renewal is known.
        change_record(store, process="another machine's 1 1")
        assert state(store).text.startswith("running: ")
        os.utime(store.resolve_path("attempts/001.json"), (0, time.time() - 100))
        silent = state(store)
        assert silent.text.startswith("no sign of life for 100 s from attempt 1, ")
        assert not silent.has_ended
        assert lease.attempt == 1
