import json
import os
import subprocess
import sys
import threading

import fsspec
import pytest

import distrain.rundir.lease
from distrain.data.storage.store import Store
from distrain.errors import AttemptError, RunError, UserError
from distrain.rundir.lease import (
    Lease,
    acquire_lease,
    count_failures,
    count_restarts_and_resizes,
    is_rolled_back,
    read_attempts,
)


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    yield Store(
        str(tmp_path) if request.param == "local" else f"memory://lease/{tmp_path.name}"
    )
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def fast(monkeypatch):
    """A second for what takes half a minute."""
    monkeypatch.setattr(distrain.rundir.lease, "LOST_AFTER_SECONDS", 1.0)
    monkeypatch.setattr(distrain.rundir.lease, "RENEW_INTERVAL_SECONDS", 0.2)


def record(store, number, **changes):
    path = f"attempts/{number:03d}.json"
    store.write(path, json.dumps({**json.loads(store.read(path)), **changes}).encode())


def test_attempts_are_numbered_and_end(store):
    told = []
    for number in (1, 2):
        with acquire_lease(store, "other", told.append) as lease:
            assert lease.attempt == number
            lease.record_start(number * 10, 1)
            lease.raise_if_superseded()
    assert told == [], "what has ended is not waited for"
    found = read_attempts(store)
    assert [(n, r["from_step"], r["ended"], r["failed"]) for n, r in found.items()] == [
        (1, 10, True, False),
        (2, 20, True, False),
    ]


def test_the_record_says_how_the_attempt_ended(store):
    with acquire_lease(store, "one", print) as lease:
        lease.set_outcome("stopped", 3, 9)
    lease = acquire_lease(store, "two", print)
    lease.set_outcome("finished", 9, 9)
    lease.close(RunError("the first line\n  - the second"))
    acquire_lease(store, "two", print).close(UserError("other settings"))
    with pytest.raises(KeyboardInterrupt), acquire_lease(store, "three", print):
        raise KeyboardInterrupt
    keys = ("failed", "outcome", "step", "steps", "error")
    found = [
        {key: record[key] for key in keys if key in record}
        for record in read_attempts(store).values()
    ]
    assert found == [
        {"failed": False, "outcome": "stopped", "step": 3, "steps": 9},
        {
            "failed": True,
            "outcome": "failed",
            "error": "the first line - the second",
        },
        {"failed": True, "outcome": "refused", "error": "other settings"},
        {"failed": True, "outcome": "failed", "error": "KeyboardInterrupt"},
    ]


def test_an_attempt_of_the_same_launch_takes_over_at_once(store):
    told = []
    with (
        acquire_lease(store, "launch", told.append) as old,
        acquire_lease(store, "launch", told.append) as new,
    ):
        assert (old.attempt, new.attempt) == (1, 2)
        with pytest.raises(
            AttemptError,
            match=r"attempt 2 has taken over .*, since attempt 1 \(this one\)",
        ):
            old.raise_if_superseded()
        new.raise_if_superseded()
    assert told == []


def test_a_living_owner_is_named(store, fast):
    told = []
    with acquire_lease(store, "one", told.append):
        record_of_another_machine(store)
        with pytest.raises(
            UserError,
            match=r"is in use by .* process \d+.* \(attempt 1\): stop that run first",
        ):
            acquire_lease(store, "two", told.append)
    assert "waiting" in told[0]


def record_of_another_machine(store):
    record(store, 1, process="boot namespace 1 2")


def test_an_owner_whose_counter_stands_still_is_gone(store, fast, monkeypatch):
    monkeypatch.setattr(Lease, "_renew_loop", lambda self: None)
    told = []
    acquire_lease(store, "one", told.append)
    record_of_another_machine(store)
    with acquire_lease(store, "two", told.append) as lease:
        assert lease.attempt == 2
    assert len(told) == 1


def test_a_dead_process_of_this_machine_is_not_waited_for(tmp_path):
    code = (
        "import os, sys; from distrain.data.storage.store import Store; "
        "from distrain.rundir.lease import acquire_lease; "
        "acquire_lease(Store(sys.argv[1]), 'one', print); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    told = []
    with acquire_lease(Store(str(tmp_path)), "two", told.append) as lease:
        assert lease.attempt == 2
    assert told == []


def test_this_process_is_not_taken_for_dead(tmp_path, fast):
    store = Store(str(tmp_path))
    with (
        acquire_lease(store, "one", print),
        pytest.raises(UserError, match=f"process {os.getpid()}"),
    ):
        acquire_lease(store, "two", lambda text: None)


def test_of_many_newcomers_each_number_belongs_to_one(tmp_path):
    store, numbers, lock = Store(str(tmp_path)), [], threading.Lock()
    start = threading.Barrier(8)

    def newcomer():
        start.wait()
        with acquire_lease(store, "launch", print) as lease, lock:
            numbers.append(lease.attempt)

    threads = [threading.Thread(target=newcomer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 9))


def test_what_was_created_and_never_filled_is_nobodys(tmp_path, fast):
    store = Store(str(tmp_path))
    store.create_exclusive("attempts/001.json", b"")
    with acquire_lease(store, "one", lambda text: None) as lease:
        assert lease.attempt == 2


def test_what_could_not_be_filled_and_is_gone_again_is_nobodys(tmp_path):
    store = Store(str(tmp_path))
    store.create_exclusive("attempts/001.json", b"")
    goer = threading.Timer(0.3, lambda: store.remove("attempts/001.json"))
    goer.start()
    with acquire_lease(store, "one", print) as lease:
        assert lease.attempt == 1
    goer.join()


@pytest.mark.parametrize(("launch", "refused"), [("one", False), ("two", True)])
def test_what_is_filled_a_moment_after_it_was_created_is_looked_at_again(
    tmp_path, launch, refused
):
    """An attempt of the same launch is superseded at once, also where it had not been filled at the first look."""
    store, told = Store(str(tmp_path)), []
    store.create_exclusive("attempts/001.json", b"")
    filled = {
        "session": launch,
        "who": "x",
        "process": "",
        "from_step": None,
        "counter": 0,
        "ended": False,
    }
    filler = threading.Timer(
        0.3, lambda: store.write("attempts/001.json", json.dumps(filled).encode())
    )
    filler.start()
    if refused:
        threading.Timer(0.9, lambda: record(store, 1, counter=1)).start()
        with pytest.raises(UserError, match=r"in use by x \(attempt 1\)"):
            acquire_lease(store, "one", told.append)
    else:
        with acquire_lease(store, "one", told.append) as lease:
            assert lease.attempt == 2
        assert told == []
    filler.join()


def test_rolled_back():
    records = {1: {"from_step": 0}, 2: {"from_step": 40}, 3: {"from_step": None}}
    assert not is_rolled_back(records, 1, 40)
    assert is_rolled_back(records, 1, 41)
    assert not is_rolled_back(records, 2, 99), (
        "attempt 3 does not know yet where it starts"
    )


def test_failures_in_a_row():
    def attempt(step, *, session="a", **changes):
        return {
            "session": session,
            "from_step": step,
            "ended": True,
            "failed": True,
            **changes,
        }

    records = {
        1: attempt(0),
        2: attempt(10),
        3: attempt(10),
        4: {"session": "a", "from_step": 10, "ended": False},
    }
    assert count_failures(records, "a", 10) == 3, "one that was killed has not ended"
    assert count_failures(records, "a", 20) == 0, "there is a new checkpoint"
    assert count_failures(records, "b", 10) == 0, "another launch starts to count anew"
    assert count_failures({**records, 5: attempt(10, failed=False)}, "a", 10) == 0, (
        "one that was asked to end"
    )


def test_restarts_and_resizes():
    def attempt(workers, **changes):
        return {
            "from_step": 0,
            "ended": True,
            "failed": False,
            "workers": workers,
            **changes,
        }

    never_began = {"from_step": None, "ended": False}
    stopped, failed, killed = (
        attempt(3),
        attempt(3, failed=True),
        attempt(2, ended=False, failed=False),
    )
    del killed["failed"]
    assert count_restarts_and_resizes({}) == (0, 0)
    assert count_restarts_and_resizes({1: failed}) == (0, 0)
    assert count_restarts_and_resizes({1: stopped, 2: attempt(2)}) == (0, 1)
    assert count_restarts_and_resizes({1: failed, 2: never_began, 3: attempt(3)}) == (
        1,
        0,
    )
    assert count_restarts_and_resizes({1: failed, 2: killed, 3: attempt(2)}) == (2, 1)
