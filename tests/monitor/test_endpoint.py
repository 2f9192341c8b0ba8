"""The page of a node: whose numbers are on it, who serves it, and what clients may do to it."""

import errno
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing, suppress

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families
from waiting import await_that

import distrain.monitor.endpoint
from distrain.monitor.endpoint import MetricsEndpoint

RANK = """
import sys, threading
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
import distrain.monitor.endpoint
distrain.monitor.endpoint.RENDER_INTERVAL_SECONDS = 0.05
from distrain.monitor.endpoint import MetricsEndpoint
registry = CollectorRegistry()
Counter("work", "Work.", registry=registry).inc(float(sys.argv[2]))
Gauge("level", "Level.", registry=registry).set(float(sys.argv[2]))
Histogram("took", "Took.", buckets=(1.0, 10.0), registry=registry).observe(float(sys.argv[2]))
options = {"launch_id": sys.argv[1], "address": "127.0.0.1", "port": int(sys.argv[3])}
node = MetricsEndpoint(registry, {"level": "sum"}, **options, log=print)
print("ready", flush=True)
sys.stdin.readline()
node.close(final=True)
"""


@pytest.fixture(autouse=True)
def often(monkeypatch, tmp_path):
    monkeypatch.setattr(distrain.monitor.endpoint, "RENDER_INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture
def port():
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def node(port, launch_id="s", registry=None, gauges=None, told=None, **metrics):
    registry = registry or CollectorRegistry()
    tell = (told if told is not None else []).append
    return MetricsEndpoint(
        registry,
        gauges or {},
        launch_id=launch_id,
        address="127.0.0.1",
        port=port,
        log=tell,
        **metrics,
    )


def get(port, path="/metrics"):
    with closing(
        http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    ) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def values(port):
    with suppress(OSError):
        families = text_string_to_metric_families(get(port)[1])
        return {
            (s.name, *s.labels.values()): s.value
            for family in families
            for s in family.samples
        }
    return {}


@pytest.fixture
def ranks(port):
    """Starts a rank as a process: (number to count)."""
    started = []

    def start(number):
        process = subprocess.Popen(
            [sys.executable, "-c", RANK, "s", str(number), str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_one_page_for_all_ranks_and_another_serves_when_one_dies(ranks, port, tmp_path):
    """Counters keep what the dead have counted, and their histograms; their gauges go; the port stays."""
    processes = [ranks(number) for number in (1, 20, 300)]
    await_that(lambda: values(port).get(("work_total",)) == 321)
    found = values(port)
    assert found["level",] == 321
    assert [found["took_bucket", le] for le in ("1.0", "10.0", "+Inf")] == [1, 1, 3]
    assert found["took_sum",] == 321
    processes[0].send_signal(signal.SIGKILL)  # the first one serves
    processes[0].wait()
    await_that(lambda: values(port).get(("level",)) == 320)
    assert values(port)["work_total",] == 321
    fourth = ranks(4000)
    await_that(lambda: values(port).get(("work_total",)) == 4321)
    for process in (fourth, *processes[1:]):
        process.communicate("end\n", timeout=20)
        assert process.returncode == 0
    assert not list(tmp_path.glob("distrain-metrics-*")), "nothing is left behind"


def test_the_last_rank_removes_what_the_server_could_not(port, tmp_path, monkeypatch):
    """A rank may write its snapshot while the server removes the folder."""
    endpoint = distrain.monitor.endpoint
    monkeypatch.setattr(endpoint, "RENDER_INTERVAL_SECONDS", 60.0)
    server, other = node(port), node(port)
    with monkeypatch.context() as patched:
        patched.setattr(endpoint.shutil, "rmtree", lambda *_, **__: None)
        server.close(final=True)
    assert list(tmp_path.glob("distrain-metrics-*"))
    other.close(final=True)
    assert not list(tmp_path.glob("distrain-metrics-*"))


def test_a_port_that_is_taken(port):
    told = []
    with closing(socket.create_server(("127.0.0.1", port))):
        one, other = node(port, "one", told=told), node(port, "two", told=told)
        try:
            assert one.served_port != other.served_port
            assert port not in (one.served_port, other.served_port)
            assert told == [], "they are announced by the caller"
            other.announce()
            one.announce()
            assert told == [
                f"metrics at http://127.0.0.1:{p}/metrics"
                for p in (other.served_port, one.served_port)
            ]
            assert get(one.served_port)[0] == 200
        finally:
            one.close(final=True)
            other.close(final=True)


def test_two_runs_in_one_process_have_pages_of_their_own(port):
    for number in (1, 2):
        registry = CollectorRegistry()
        Counter("work", "Work.", registry=registry).inc(number)
        page = node(port, f"run-{number}", registry)
        await_that(lambda: values(port))
        assert values(port)["work_total",] == number
        page.close(final=True)
    with pytest.raises(OSError, match="refused"):
        get(port)


def test_an_attempt_that_failed_leaves_its_counters_and_no_gauge(port, tmp_path):
    registry = CollectorRegistry()
    Counter("work", "Work.", registry=registry).inc(7)
    Gauge("level", "Level.", registry=registry).set(7)
    node(port, registry=registry, gauges={"level": "max"}).close(final=False)
    later = CollectorRegistry()
    Counter("work", "Work.", registry=later).inc(1)
    page = node(port, registry=later, gauges={"level": "max"})
    await_that(lambda: values(port).get(("work_total",)) == 8)
    assert ("level",) not in values(port)
    page.close(final=True)


def test_a_rank_that_cannot_serve_leaves_the_numbers_of_the_others(port, monkeypatch):
    registry = CollectorRegistry()
    Counter("work", "Work.", registry=registry).inc(7)
    node(port, registry=registry).close(final=False)

    def refuse(*_):
        raise OSError(errno.EADDRNOTAVAIL, "not an address of this machine")

    with monkeypatch.context() as patched:
        patched.setattr(distrain.monitor.endpoint, "PageServer", refuse)
        with pytest.raises(OSError, match="not an address"):
            node(port, registry=registry)
    page = node(port)
    await_that(lambda: ("work_total",) in values(port))
    assert values(port)["work_total",] == 7, "without those of the rank that failed"
    page.close(final=True)


def test_a_url_is_told_once_by_whoever_serves_first_and_again_if_it_changes(port):
    told = []
    node(port, told=told).close(final=False)
    assert told == [], "it ended before it was announced"
    page = node(port, told=told)
    page.announce()
    page.announce()
    page.close(final=False)
    page = node(port, told=told)
    page.announce()
    page.close(final=False)
    with closing(socket.create_server(("127.0.0.1", port))):
        page = node(port, told=told)
        page.announce()
    moved = page.served_port
    page.close(final=True)
    assert told == [f"metrics at http://127.0.0.1:{p}/metrics" for p in (port, moved)]
    assert moved != port


def test_a_run_that_has_ended_waits_for_one_more_read(port):
    registry = CollectorRegistry()
    Counter("work", "Work.", registry=registry).inc()
    page = node(port, registry=registry)
    await_that(lambda: values(port) is not None and get(port)[0] == 200)
    closing_thread = threading.Thread(
        target=lambda: page.close(linger_seconds=60.0, final=True)
    )
    closing_thread.start()
    closing_thread.join(0.3)
    assert closing_thread.is_alive(), "it waits"
    assert get(port)[0] == 200
    closing_thread.join(20)
    assert not closing_thread.is_alive(), "and not for long after it was read"


def test_a_page_that_nobody_reads_is_not_waited_for(port):
    page = node(port)
    began = time.monotonic()
    page.close(linger_seconds=60.0, final=True)
    assert time.monotonic() - began < 30


def test_a_folder_of_somebody_else_is_refused(port, tmp_path, monkeypatch):
    page = node(port)
    page.close(final=False)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    (folder,) = tmp_path.glob("distrain-metrics-*")
    folder.rename(str(folder).replace("metrics-0-", "metrics-12345-"))
    with pytest.raises(PermissionError):
        node(port)


def test_what_was_left_behind_is_swept(port, tmp_path, monkeypatch):
    """Folders of launches whose processes are all dead, after a while; not those of the living."""
    dead, living = (
        tmp_path / f"distrain-metrics-{os.getuid()}-{name}"
        for name in ("dead", "living")
    )
    gone = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os; from distrain.distributed.process import get_process_identity as p; print(p(os.getpid()))",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    own = distrain.monitor.endpoint.get_process_identity(os.getpid())
    for folder, process in ((dead, gone), (living, own)):
        folder.mkdir()
        (folder / "1-1.json").write_text(
            json.dumps({"process": process, "families": []})
        )
    node(port, "a").close(final=True)
    assert dead.exists()
    monkeypatch.setattr(distrain.monitor.endpoint, "_ABANDONED_AFTER_SECONDS", -1.0)
    node(port, "b").close(final=True)
    assert living.exists()
    assert not dead.exists()


def test_a_histogram_and_labels_go_through(port):
    registry = CollectorRegistry()
    Histogram(
        "h",
        'With "quotes" and \\ in its help.',
        ["name"],
        buckets=(1.0,),
        registry=registry,
    ).labels('a"b\n').observe(0.5)
    page = node(port, registry=registry)
    try:
        await_that(lambda: values(port))
        assert values(port)["h_count", 'a"b\n'] == 1
        assert not [name for name, *_ in values(port) if name.endswith("_created")]
    finally:
        page.close(final=True)


def test_pages_of_many_dead_ranks_become_one(ranks, port, tmp_path, monkeypatch):
    monkeypatch.setattr(distrain.monitor.endpoint, "_MAX_DEAD_SNAPSHOTS", 2)
    registry = CollectorRegistry()
    Counter("work", "Work.", registry=registry).inc(1)
    own = node(port, registry=registry, gauges={"level": "sum"})
    for number in (20, 300, 4000, 50000):
        process = ranks(number)
        process.kill()
        process.wait()
    await_that(lambda: values(port).get(("work_total",)) == 54321)
    (folder,) = tmp_path.glob("distrain-metrics-*")
    await_that(
        lambda: len(list(folder.glob("*.json"))) <= 2 + 2 + 1
    )  # serving, our own, one or two more, the dead
    assert list(folder.glob("dead-*.json"))
    for _ in range(5):
        time.sleep(0.06)
        assert values(port)["work_total",] == 54321, "at any time"
    assert values(port)["took_sum",] == 54320
    own.close(final=True)


def test_pages_that_were_folded_and_not_yet_removed_count_once(
    port, tmp_path, monkeypatch
):
    """A rank that is killed between the two leaves both."""
    monkeypatch.setattr(distrain.monitor.endpoint, "_MAX_DEAD_SNAPSHOTS", 0)
    monkeypatch.setattr(type(tmp_path), "unlink", lambda *_, **__: None)
    registry = CollectorRegistry()
    Counter("work", "Work.", registry=registry).inc(7)
    own = node(port, registry=registry)
    (folder,) = tmp_path.glob("distrain-metrics-*")
    families = [
        {
            "name": "work",
            "help": "Work.",
            "type": "counter",
            "samples": [["work_total", {}, 5.0]],
        }
    ]
    for number in range(3):
        dead = {
            "process": f"{' '.join(own._process_identity.split()[:2])} {2**22 + 1 + number} 1",
            "families": families,
        }
        (folder / f"{number}.json").write_text(json.dumps(dead))
    await_that(
        lambda: (
            values(port).get(("work_total",)) == 22 and list(folder.glob("dead-*.json"))
        )
    )
    for _ in range(5):
        time.sleep(0.06)
        assert values(port)["work_total",] == 22
    monkeypatch.undo()
    own.close(final=True)


def test_a_page_goes_on_after_something_has_failed(port):
    class Sometimes:
        fails = False

        def collect(self):
            if self.fails:
                raise RuntimeError("no open file left")
            yield from ()

    registry, told, sometimes = CollectorRegistry(), [], Sometimes()
    level = Gauge("level", "Level.", registry=registry)
    registry.register(sometimes)
    own = node(port, registry=registry, gauges={"level": "sum"}, told=told)
    sometimes.fails = True
    await_that(lambda: any("is not updated" in text for text in told))
    sometimes.fails = False
    level.set(3)
    await_that(lambda: values(port).get(("level",)) == 3)
    assert sum("is not updated" in text for text in told) == 1
    own.close(final=True)
