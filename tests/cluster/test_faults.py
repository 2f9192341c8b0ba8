"""The same weights through faults. One run without an end goes through all; each test compares its next checkpoint.

The tests run in any order: what the run lacks (a worker, a host, its driver) is back before each.
"""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from hosts import HEAD, PYTHON
from waiting import PATIENCE, await_that

pytestmark = pytest.mark.cluster


@pytest.fixture
def timed(table):
    """Notes when a fault was found and when training went on."""

    def note(run, fault: float, pattern: str) -> None:
        found = run.wait_for(pattern, since=fault)
        again = run.wait_for(r"training resumed after", since=fault)
        told = next(line for at, line in run.lines if at == again)
        table(
            f"found after {found - fault:.1f} s, training after {again - fault:.1f} s; {told.partition(', ')[2]}"
        )

    return note


@pytest.fixture
def served(hosts, digits):
    """A web server for the digits, that can be stopped and started: (its URL, start, stop)."""
    servers = []

    def start() -> None:
        script = str(Path(__file__).parent / "range_server.py")
        servers.append(
            hosts.popen(
                "client", PYTHON, script, str(digits), hosts.address["client"], "8000"
            )
        )
        await_that(lambda: ":8000" in hosts.run("client", "ss", "-Hltn"), "the server")

    def stop() -> None:
        hosts.kill("client", "range_server.py")
        servers.pop().wait()

    start()
    yield f"http://{hosts.address['client']}:8000", start, stop
    if servers:
        stop()


@pytest.mark.namespaces
def test_the_object_store_is_gone_for_30_s(endless, served, table):
    url, start, stop = served
    run = endless.train(f"data.train={url}/train", "data.memory=100kB")
    stop()
    gone = time.monotonic()
    await_that(lambda: time.monotonic() - gone > 30, "the outage", 31)
    before = max(at for at, _ in run.lines)
    start()
    endless.check()
    endless.stop()  # while its data are there
    assert before < gone + 20, "no step was told while the store was away"
    assert "lost" not in run.since(gone)
    table("waited, no restart")


@pytest.mark.namespaces
def test_bad_links(endless, hosts, table):
    """One loses 2 % of its packets, one has 100 Mbit/s: a group forms, and trains."""
    endless.stop()
    hosts.lose("n2", 2)
    hosts.rate("n3", "100mbit")
    run = endless.train()
    began = time.monotonic()
    run.wait_until(lambda: run.since(began).count("  step ") >= 5, "fifty steps")
    endless.check()
    assert "lost" not in run.text
    table("no restart")


def test_a_killed_worker(endless, hosts, timed):
    run = endless.train()
    fault = time.monotonic()
    hosts.kill("n2", "ray::RayTrainWorker")
    timed(run, fault, r"lost rank \d on [\d.]+: The actor is dead")
    endless.check()
    assert "worker group formed: 3 workers" in run.since(fault)
    assert "A worker died or was killed" not in run.text, "Ray's own walls of text"


def test_a_worker_gets_sigterm(endless, hosts, timed):
    run = endless.train()
    (pid,) = hosts.pids("n2", "ray::RayTrainWorker")
    fault = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    timed(run, fault, r"a worker received SIGTERM: saved")
    endless.check()
    assert "no step recomputed" in run.since(fault)


@pytest.mark.namespaces
def test_a_power_cut_and_the_host_comes_back(endless, hosts, timed):
    run = endless.train()
    fault = time.monotonic()
    hosts.crash("n3")
    timed(run, fault, r"lost rank")
    endless.check()
    assert "worker group formed: 2 workers" in run.since(fault)
    hosts.boot("n3")
    added = time.monotonic()
    hosts.start_ray("n3")
    timed(run, added, r"there is room for 3 workers, 1 more: saving")
    endless.check()
    assert "worker group formed: 3 workers" in run.since(added)
    assert "no step recomputed" in run.since(added)


def test_a_killed_raylet(endless, hosts, timed):
    run = endless.train()
    fault = time.monotonic()
    hosts.kill("n3", "raylet/raylet")
    timed(run, fault, r"lost rank")
    endless.check()
    assert "worker group formed: 2 workers" in run.since(fault)


@pytest.mark.namespaces
def test_a_host_is_drained(endless, hosts, timed):
    run = endless.train()
    fault = time.monotonic()
    drain = endless.commands.distrain("n2", "drain", "--seconds=60")
    timed(run, fault, r"10.78.0.12 is being drained: saving")
    text = drain.end()
    assert (
        f"{hosts.address['n2']}: no new work is placed here; waiting until this node is idle"
        in text
    )
    assert f"{hosts.address['n2']}: drained, no work is left on this node" in text
    assert drain.told("no work is left on this node") > run.told(
        "is being drained: saving", since=fault
    )
    endless.check()
    assert "worker group formed: 2 workers" in run.since(fault)
    assert "no step recomputed" in run.since(fault)
    assert "lost rank" not in run.since(fault)


@pytest.mark.namespaces
def test_a_cable_is_out_for_longer_than_the_heartbeat(endless, hosts, timed, table):
    """The run goes on without the host, whose Ray ends soon after the cable is back: a supervisor starts it again."""
    run = endless.train()
    (raylet,) = hosts.pids("n3", "raylet/raylet")
    fault = time.monotonic()
    hosts.cut("n3")
    await_that(
        lambda: time.monotonic() - fault > 15, "the cable to be out for 15 s", 16
    )
    hosts.heal("n3")
    healed = time.monotonic()
    await_that(
        lambda: raylet not in hosts.pids("n3", "raylet/raylet"),
        "Ray to end on the dead host",
        PATIENCE,
    )
    table(f"its Ray ends {time.monotonic() - healed:.1f} s after the cable is back")
    timed(run, fault, r"lost rank")
    endless.check()


@pytest.mark.namespaces
def test_the_checkpoint_store_is_full_for_a_while(endless, disk, table):
    run = endless.train()
    block = disk / "block"
    try:
        fault = time.monotonic()
        fill(block)
        told = run.wait_for("could not be saved yet", since=fault)
    finally:
        block.unlink()
    endless.check()
    assert "lost" not in run.since(fault)
    table(f"told after {told - fault:.1f} s, no restart")


def test_a_killed_controller(endless, hosts, timed):
    run = endless.train()
    fault = time.monotonic()
    hosts.kill(HEAD, "ray::TrainController")
    timed(run, fault, r"Ray Train failed")
    endless.check()


@pytest.mark.namespaces
def test_a_second_run_on_one_directory_is_refused(endless):
    """From a host that is no part of the cluster, but shares the storage."""
    run = endless.train()
    asked = time.monotonic()
    text = endless.commands(
        "--workers=1", config=endless.config, host="client", address=None
    ).end(2)
    assert re.search(r"is in use by \w+ on n\d, process \d+, since", text)
    assert "stop that run first" in text
    run.wait_for("step ", since=time.monotonic())
    assert "lost" not in run.since(asked)


@pytest.mark.namespaces
def test_all_hosts_restart(endless, hosts):
    run = endless.train()
    for host in ("n1", "n2", "n3"):
        hosts.crash(host)
    run.process.wait(timeout=PATIENCE)
    hosts.up("n1", "n2", "n3")
    endless.train()
    endless.check()


@pytest.mark.namespaces
def test_a_driver_that_ends_leaves_nothing_behind_and_the_same_command_goes_on(endless):
    """Neither processes of the run nor shared memory, on any host. Ctrl-C: see `Endless.stop`."""
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)):
        run = endless.train()
        endless.check()
        assert endless.commands.leftovers()
        endless.commands.signal(number)
        text = run.end(code)
        assert ("stopped and saved after step" in text) == (number != signal.SIGKILL)
        await_that(
            lambda: endless.commands.leftovers() == [], "all ranks to end", PATIENCE
        )


def test_a_hanging_rank(endless, hosts, timed):
    run = endless.train("cluster.stall=12")
    (pid,) = hosts.pids("n2", "ray::RayTrainWorker")
    fault = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    timed(run, fault, r"lost rank")
    endless.check()


def fill(block: Path) -> None:
    """Write until the disk is full."""
    with (
        block.open("wb", buffering=0) as file,
        pytest.raises(OSError, match="No space left"),
    ):
        write_on(file)


def write_on(file) -> None:
    while True:
        file.write(bytes(1 << 16))
