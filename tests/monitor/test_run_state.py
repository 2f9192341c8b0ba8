"""What a run directory shows of a run: whether it is running, and how it ended."""

import json
import os

import pytest
import torch

from distrain.data.storage.store import Store
from distrain.distributed.process import get_process_identity
from distrain.distributed.world import World
from distrain.errors import RunError
from distrain.monitor.run_state import read_run_state
from distrain.monitor.top import RunWatcher, find_problems, render_lines
from distrain.trainer import train

ELSEWHERE = "boot namespace 1 2"
IDENTITY = get_process_identity(os.getpid())


@pytest.fixture
def store(tmp_path):
    """A run directory with a metrics page that does not answer."""
    store = Store(str(tmp_path))
    store.write("config.yaml", b"")
    store.write("targets.json", b'[{"targets": ["127.0.0.1:1"]}]')
    return store


@pytest.mark.parametrize(
    ("change", "text", "has_ended"),
    [
        ({}, "finished: 22 steps", True),
        ({"stops": True}, "attempt 1 stopped after step 1 of 22", True),
        (
            {"schedule": {"name": "constant", "lr": 1e12}},
            "attempt 1 failed: training diverged at step 2: ",
            True,
        ),
        (
            {"data": {"train": "/none"}},
            "attempt 1 was refused and changed nothing: no data set at /none "
            "(it does not exist)",
            True,
        ),
    ],
)
def test_how_a_run_ended(narrow, console, change, text, has_ended):
    """Of `train` in Python, as of the command: the attempt's record alone counts."""
    change = {"log": {"every": 1}, **change}
    stops = change.pop("stops", False)
    config = narrow(**change)
    world = World(torch.device("cpu"))
    if stops:
        world.stop_requested.set()
    store = Store(config.run)
    error = ""
    try:
        train(config, world, console)
    except (OSError, ValueError, RunError) as raised:
        error = str(raised)
    state = read_run_state(store)
    assert state.has_ended is has_ended
    assert state.text.startswith(text)
    if "failed" in text:
        assert state.text == f"attempt 1 failed: {error}"
    else:
        assert state.text == text
    if "diverged" in text:
        assert f"{config.run}/not-finite-step-00000002.json" in error
    if "finished" in text:
        assert train(config, world, console).status == "already finished"
        assert read_run_state(store) == (text, True)
        shown = list(render_lines(RunWatcher(config.run).refresh_view(), 80))
        assert shown[1] == text


FAILED = {"ended": True, "failed": True}
ENDED = {"ended": True, "failed": False}


@pytest.mark.parametrize(
    ("record", "text", "has_ended"),
    [
        ({}, "running: attempt 2, me", False),
        ({"process": IDENTITY}, "running: attempt 2, me", False),
        (
            {"process": f"{IDENTITY}1"},
            "killed: attempt 2, me, died without releasing the run directory",
            True,
        ),
        (
            {**ENDED, "outcome": "finished", "step": 9, "steps": 9},
            "finished: 9 steps",
            True,
        ),
        (
            {**ENDED, "outcome": "stopped", "step": 3, "steps": 9},
            "attempt 2 stopped after step 3 of 9",
            True,
        ),
        (
            {**FAILED, "outcome": "failed", "error": "no route"},
            "attempt 2 failed: no route",
            True,
        ),
        (
            {**FAILED, "outcome": "refused", "error": "a is b: - c: 1 - d: 2 do e"},
            "attempt 1 failed; attempt 2 was refused and changed nothing: a is b",
            True,
        ),
        # Of versions that wrote no outcome.
        (ENDED, "attempt 2 ended", True),
        (FAILED, "attempt 2 failed", True),
    ],
)
def test_a_record(store, record, text, has_ended):
    """Only a run that nobody trains may have pages that do not answer."""
    common = {"session": "s", "who": "me", "process": ELSEWHERE, "ended": False}
    store.write("attempts/001.json", json.dumps({**common, **FAILED}).encode())
    store.write("attempts/002.json", json.dumps({**common, **record}).encode())
    # The log and the evidence of attempt 1 do not count.
    store.write("log-20260101-000000.txt", b"2026-01-01T00:00:00Z error: old\n")
    store.write("not-finite-step-00000002.json", b"{}")
    assert read_run_state(store) == (text, has_ended)
    problems = find_problems(RunWatcher(store.url).refresh_view(), 0.0)
    silent = ["http://127.0.0.1:1/metrics does not answer"]
    assert problems == ([] if has_ended else silent)


def test_a_run_without_attempts(store):
    assert read_run_state(store) == ("not started", False)
