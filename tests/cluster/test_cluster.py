"""The same weights on any cluster, through faults. Each run is compared with the undisturbed one of one process."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from hosts import HEAD, PYTHON
from waiting import await_that

pytestmark = pytest.mark.cluster


@pytest.fixture
def timed(table):
    """Notes when a fault was found and when training went on."""

    def note(run, fault: float, pattern: str) -> None:
        found = run.wait_for(pattern, since=fault)
        again = run.wait_for(r"training again after", since=fault)
        told = next(line for at, line in run.lines if at == again)
        table(f"found after {found - fault:.1f} s, training after {again - fault:.1f} s; {told.partition(', ')[2]}")

    return note


@pytest.mark.namespaces
def test_workers_on_one_machine_with_a_ray_of_its_own(start, wanted, hosts):
    """And nothing of it is left: no process, no shared memory, no session."""
    sessions = set(Path("/tmp").glob("distrain-ray-*"))
    run = start("--workers=3", host="client", address=None)
    assert run.weights() == wanted()
    assert "worker group formed: 3 workers" in run.text
    await_that(lambda: len(hosts.pids("client", "")) == 2, "all but the host's init and its sleep to end")
    assert hosts.shared_memory("client") == []
    assert set(Path("/tmp").glob("distrain-ray-*")) == sessions


@pytest.mark.namespaces
def test_a_client_outside_the_cluster(start, wanted, hosts):
    run = start("--workers=2", host="client", address=f"ray://{hosts.address[HEAD]}:10001")
    assert run.weights() == wanted()


def test_a_killed_worker(start, wanted, hosts, timed):
    run = start("--workers=3")
    run.wait_for_step(60)
    fault = time.monotonic()
    hosts.kill("n2", "ray::RayTrainWorker")
    timed(run, fault, r"lost rank \d on [\d.]+: The actor is dead")
    assert run.weights() == wanted()
    assert "worker group formed: 3 workers" in run.text
    assert "A worker died or was killed" not in run.text, "Ray's own walls of text"


def test_a_worker_gets_sigterm(start, wanted, hosts, timed):
    run = start("--workers=3")
    run.wait_for_step(60)
    (pid,) = hosts.pids("n2", "ray::RayTrainWorker")
    fault = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    timed(run, fault, r"a worker was told to end \(SIGTERM\): saved")
    assert run.weights() == wanted()
    assert "no step computed again" in run.text


def test_a_killed_raylet(start, wanted, hosts, timed):
    run = start("--workers=1-3")
    run.wait_for_step(60)
    fault = time.monotonic()
    hosts.kill("n3", "raylet/raylet")
    timed(run, fault, r"lost rank")
    assert run.weights() == wanted()
    assert "worker group formed: 2 workers" in run.text


@pytest.mark.namespaces
def test_a_power_cut(start, wanted, hosts, timed):
    run = start("--workers=1-3")
    run.wait_for_step(60)
    fault = time.monotonic()
    hosts.crash("n3")
    timed(run, fault, r"lost rank")
    assert run.weights() == wanted()
    assert "worker group formed: 2 workers" in run.text


def test_a_node_is_added(start, wanted, longer, hosts, timed):
    hosts.crash("n3")
    hosts.up("n1", "n2")
    run = start("--workers=1-3", config=longer)
    run.wait_for_step(20)
    assert "worker group formed: 2 workers" in run.text
    hosts.boot("n3")
    fault = time.monotonic()
    hosts.start_ray("n3")
    timed(run, fault, r"there is room for 3 workers, 1 more: saving")
    assert run.weights() == wanted(longer)
    assert "worker group formed: 3 workers" in run.text
    assert "no step computed again" in run.text


@pytest.mark.namespaces
def test_a_node_is_drained(start, wanted, longer, hosts, timed):
    run = start("--workers=1-3", config=longer)
    run.wait_for_step(60)
    fault = time.monotonic()
    drain = start.distrain("n2", "drain", "--seconds=60")
    timed(run, fault, r"10.78.0.12 is being drained: saving")
    text = drain.end()
    assert f"{hosts.address['n2']}: nothing new is placed here; waiting for what is at work" in text
    assert f"{hosts.address['n2']}: nobody works here any more" in text
    assert drain.told("nobody works here") > run.told("is being drained: saving")
    assert run.weights() == wanted(longer)
    assert "worker group formed: 2 workers" in run.text
    assert "no step computed again" in run.text
    assert "lost rank" not in run.text


@pytest.mark.namespaces
def test_a_cable_is_out_for_longer_than_the_heartbeat(start, wanted, hosts, timed, table):
    """The run goes on without the host, whose Ray ends soon after the cable is back: a supervisor starts it again."""
    run = start("--workers=1-3")
    run.wait_for_step(60)
    (raylet,) = hosts.pids("n3", "raylet/raylet")
    fault = time.monotonic()
    hosts.cut("n3")
    await_that(lambda: time.monotonic() - fault > 25, "the cable to be out for 25 s", 26)
    hosts.heal("n3")
    healed = time.monotonic()
    await_that(lambda: raylet not in hosts.pids("n3", "raylet/raylet"), "Ray to end on a host that is dead to it")
    table(f"its Ray ends {time.monotonic() - healed:.1f} s after the cable is back")
    timed(run, fault, r"lost rank")
    assert run.weights() == wanted()


@pytest.mark.namespaces
def test_bad_links(start, wanted, hosts, table):
    """One loses 2 % of its packets, one has 100 Mbit/s."""
    hosts.lose("n2", 2)
    hosts.rate("n3", "100mbit")
    run = start("--workers=3")
    began = run.wait_for("worker group formed")
    assert run.weights() == wanted()
    table(f"trained for {time.monotonic() - began:.0f} s, no restart")
    assert "lost" not in run.text


@pytest.mark.namespaces
def test_the_checkpoint_store_is_full_for_a_while(start, wanted, disk, table):
    run = start("--workers=2", "checkpoint.keep=1")
    run.wait_for_step(60)
    block = disk / "block"
    try:
        fault = time.monotonic()
        fill(block)
        told = run.wait_for("could not be saved yet", since=fault)
    finally:
        block.unlink()
    assert run.weights() == wanted()
    table(f"told after {told - fault:.1f} s, no restart")
    assert "lost" not in run.text


@pytest.mark.namespaces
def test_the_object_store_is_gone_for_30_s(start, wanted, hosts, digits, table):
    def serve():
        script = str(Path(__file__).parent / "range_server.py")
        server = hosts.popen("client", PYTHON, script, str(digits), hosts.address["client"], "8000")
        await_that(lambda: ":8000" in hosts.run("client", "ss", "-Hltn"), "the server")
        return server

    def stop(server):
        hosts.kill("client", "range_server.py")
        server.wait()

    server = serve()
    url = f"data.train=http://{hosts.address['client']}:8000/train"
    run = start("--workers=2", url, "data.memory=100kB")
    run.wait_for_step(60)
    stop(server)
    gone = time.monotonic()
    await_that(lambda: time.monotonic() - gone > 30, "the outage", 31)
    before = max(at for at, _ in run.lines)
    server = serve()
    try:
        assert run.weights() == wanted()
    finally:
        stop(server)
    assert gone - 1 < before < gone + 20, "no step was told while the store was away"
    table("waited, no restart")
    assert "lost" not in run.text


def test_a_run_that_makes_no_progress_ends_with_the_first_cause(start, digits, tmp_path):
    shutil.copytree(digits / "train", tmp_path / "damaged")
    shard = next((tmp_path / "damaged").glob("*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    text = start("--workers=2", f"data.train={tmp_path}/damaged", "cluster.max_failures=2").end(1, 240)
    assert text.count("worker group formed") == 3
    assert "error: 2 attempts in a row failed after step 0 without a new checkpoint" in text
    assert re.search(r"the first cause was: lost rank \d on [\d.]+: .*parquet is damaged: bytes", text)
    assert "Traceback" not in text


def test_signals_to_the_driver_and_the_same_command_again(start, wanted, hosts):
    for number, reached in ((signal.SIGTERM, 40), (signal.SIGINT, 100)):
        run = start("--workers=1-3")
        run.wait_for_step(reached)
        (pid,) = hosts.pids(HEAD, "-m distrain train")
        os.kill(pid, number)
        assert "stopped and saved after step" in run.end(128 + number)
    again = start("--workers=1-3", "--resume")
    assert again.weights() == wanted()


def test_a_killed_controller(start, wanted, hosts, timed):
    run = start("--workers=2")
    run.wait_for_step(60)
    fault = time.monotonic()
    hosts.kill(HEAD, "ray::TrainController")
    timed(run, fault, r"Ray's controller")
    assert run.weights() == wanted()


@pytest.mark.namespaces
def test_the_head_restarts(start, wanted, hosts):
    run = start("--workers=2")
    run.wait_for_step(60)
    for host in ("n1", "n2", "n3"):
        hosts.crash(host)
    run.process.wait(timeout=60)
    hosts.up("n1", "n2", "n3")
    again = start("--workers=2", "--resume")
    assert again.weights() == wanted()


def test_a_second_run_on_one_directory_is_refused(start, recipe, hosts):
    endless = recipe.model_copy(update={"epochs": 10_000})
    run = start("--workers=1", config=endless)
    run.wait_for_step(20)
    (first,) = hosts.pids(HEAD, "-m distrain train")
    text = start("--workers=1", config=endless).end(2, 120)
    assert re.search(r"is in use by \w+ on n\d, process \d+, since", text)
    assert "stop that run first" in text
    run.wait_for_step(20, since=time.monotonic())
    os.kill(first, signal.SIGINT)
    assert "stopped and saved after step" in run.end(130)


def test_a_hanging_rank(start, wanted, hosts, timed):
    run = start("--workers=3", "cluster.stall=12")
    run.wait_for_step(60)
    (pid,) = hosts.pids("n2", "ray::RayTrainWorker")
    fault = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    timed(run, fault, r"lost rank")
    assert run.weights() == wanted()


@pytest.mark.namespaces
def test_nothing_is_left_behind(start, hosts, wanted):
    """Processes of the run and shared memory, on any host, after a run that was killed and one that ended."""
    await_that(lambda: leftovers(hosts) == [], "all ranks to end")
    run = start("--workers=3")
    run.wait_for_step(20)
    assert leftovers(hosts)
    for pid in hosts.pids(HEAD, "-m distrain train"):
        os.kill(pid, signal.SIGKILL)
    run.process.wait()
    await_that(lambda: leftovers(hosts) == [], "all ranks to end", 60)
    assert start("--workers=3").weights() == wanted()
    await_that(lambda: leftovers(hosts) == [], "all ranks to end", 60)


def fill(block) -> None:
    """Write until the disk is full."""
    with block.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        write_on(file)


def write_on(file) -> None:
    while True:
        file.write(bytes(1 << 16))


def leftovers(hosts) -> list[tuple[str, str]]:
    found = []
    for host in ("n1", "n2", "n3"):
        found += [(host, name) for name in ("ray::RayTrain", "ray::Train", "ray::Mailbox") if hosts.pids(host, name)]
        found += [(host, name) for name in hosts.shared_memory(host) if "torch" in name or "distrain" in name]
    return found
