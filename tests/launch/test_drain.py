"""The runs that a head's drain finds, by their mailboxes' names, and what it does to their processes."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import ray
from waiting import PATIENCE, await_that

from distrain.errors import RunError, UserError
from distrain.launch import drain, mailbox

# Ends after a SIGTERM, when it has read to the end of its input: until then it "saves".
RUN = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print("ready", flush=True)
signal.sigwait({signal.SIGTERM})
sys.stdin.read()
sys.exit(143)
"""


@pytest.fixture
def names(monkeypatch):
    """What Ray's list of named actors has."""
    found = []
    monkeypatch.setattr(
        mailbox,
        "list_named_actors",
        lambda all_namespaces: [{"name": n} for n in found],
    )
    return found


@pytest.fixture
def process():
    """A run, as far as signals go."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", RUN], text=True, **pipes) as started:
        assert started.stdout.readline() == "ready\n"
        yield started
        started.kill()


def named(pid, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: pid)
        return mailbox.make_mailbox_name()


def test_drivers_of_this_machine_are_signalled_and_waited_for(
    console, names, process, monkeypatch
):
    names += ["somebody else's actor", named(process.pid, monkeypatch)]
    drivers = drain._DriverStopper(console)
    assert not drivers.signal_and_poll()
    assert console.events == [
        f"sent SIGTERM to process {process.pid}: it saves a checkpoint and ends"
    ]
    names.clear()  # Ray forgets a driver before its process ends
    assert not drivers.signal_and_poll()
    process.stdin.close()
    await_that(drivers.signal_and_poll, "the process to end", PATIENCE)
    assert process.wait() == 143
    assert len(console.events) == 1


def test_a_driver_that_comes_meanwhile_is_signalled_too(
    console, names, process, monkeypatch
):
    drivers = drain._DriverStopper(console)
    assert drivers.signal_and_poll(), "there is none"
    names.append(named(process.pid, monkeypatch))
    assert not drivers.signal_and_poll()
    process.stdin.close()
    assert process.wait(PATIENCE) == 143


@pytest.mark.parametrize("where", ["another machine", "another container"])
def test_a_process_of_the_same_number_elsewhere_is_left_alone(
    console, names, process, monkeypatch, where
):
    with monkeypatch.context() as patch:
        if where == "another machine":
            patch.setattr(mailbox, "_BOOT_ID_PATH", mailbox.Path(__file__))
        else:
            patch.setattr(os, "readlink", lambda _: "pid:[1]")
        names.append(named(process.pid, monkeypatch))
    drivers = drain._DriverStopper(console)
    assert drivers.signal_and_poll()
    assert process.poll() is None


def test_a_driver_that_has_ended_is_not_signalled(console, names, process, monkeypatch):
    names.append(named(process.pid, monkeypatch))
    process.send_signal(signal.SIGKILL)
    process.wait()
    drivers = drain._DriverStopper(console)
    assert drivers.signal_and_poll()
    assert console.events == []


def test_no_line_for_a_driver_that_ends_just_before_the_signal(
    console, names, process, monkeypatch
):
    kill = os.kill

    def too_late(pid, _):
        kill(pid, signal.SIGKILL)
        process.wait()
        raise ProcessLookupError

    names.append(named(process.pid, monkeypatch))
    monkeypatch.setattr(os, "kill", too_late)
    drivers = drain._DriverStopper(console)
    assert drivers.signal_and_poll()
    assert console.events == []


@pytest.mark.parametrize(
    ("address", "place"), [("127.0.0.1:6399", " at 127.0.0.1:6399"), (None, "")]
)
def test_a_head_that_does_not_answer_is_given_up(console, monkeypatch, address, place):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    answer = threading.Event()

    def connect(**_):
        # Not for ever: a drain that waits for it must fail, not hang.
        assert answer.wait(20), "drain waited for Ray beyond its limit"

    monkeypatch.setattr(ray, "init", connect)
    with pytest.raises(
        RunError, match=f"Ray's head{place} did not answer within 1 s, so nothing"
    ):
        drain.drain(1, console=console)
    # The thread has changed Ray's settings, and restores them as it ends: before another
    # one changes them, or they would stay changed.
    answer.set()
    for thread in threading.enumerate():
        if thread.name == "distrain-connect":
            thread.join()


@pytest.mark.parametrize(
    ("error", "raised"), [(ConnectionError, UserError), (MemoryError, MemoryError)]
)
def test_a_host_without_ray_has_nothing_to_drain(console, monkeypatch, error, raised):
    def fail(**_):
        raise error

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(raised):
        drain.drain(60, console=console)
