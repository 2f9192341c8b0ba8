"""What the metrics page costs: `python tests/bench/metrics.py`.

Images a second of the quickstart's network with the page against without, in interleaved rounds of about a minute each:
read once a second, against a run without a page; and read 20 times a second, beside malformed requests, clients that
say nothing, clients that write or read byte by byte, and over 1,000 connections a minute. Attackers take time of the
same cores, which the page is not to blame for: that run is compared with one without a page, while attackers of another
process's page are at work. Less than a per cent is hard to see on a shared machine, so all of it is done at ten times
the rate as well. What the page costs by itself is its threads' share in the CPU time of the run.
"""

import http.client
import itertools
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

ROUNDS, EPOCHS = 6, 40
# Whose page is read, by whom; and against which of these.
KINDS = {
    "without": (None, None, None),
    "read once a second": ("own", "once_a_second", "without"),
    "another's attacked": ("another's", "hostile", None),
    "attacked": ("own", "hostile", "another's attacked"),
    "another's attacked tenfold": ("another's", "tenfold", None),
    "attacked tenfold": ("own", "tenfold", "another's attacked tenfold"),
}


class Speed:
    """A console that keeps the speeds, and what the threads of the page have cost so far."""

    def __init__(self) -> None:
        self.speeds: list[float] = []
        self.page_seconds = 0.0

    def record(self, record: Any) -> None:
        """A line of metrics."""
        if record["kind"] == "train":
            self.speeds.append(record["images_per_second"])
        self.page_seconds = sum(
            cpu_seconds(thread.native_id) for thread in threading.enumerate() if "distrain-metrics" in thread.name
        )

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_, **__: None


def cpu_seconds(thread: int | None) -> float:
    """CPU time of a thread of this process."""
    fields = Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scrape(port: int) -> float:
    """Milliseconds of one; not a number where it failed."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        with closing(connection):
            connection.request("GET", "/metrics")
            connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return math.nan
    return 1000 * (time.perf_counter() - began)


def once_a_second(port: int) -> None:
    """Scrape until killed, printing milliseconds."""
    while True:
        time.sleep(1.0)
        print(scrape(port), flush=True)  # noqa: T201


def hostile(port: int, rate: float = 20.0) -> None:
    """Scrape so many times a second and misbehave as often, until killed."""
    clients: list[tuple[socket.socket, Iterator[None]]] = []
    behaviours = itertools.cycle([silent, silent, malformed, slow_writer, slow_reader])
    began = time.monotonic()
    for count in itertools.count():
        time.sleep(max(0.0, began + count / rate - time.monotonic()))
        print(scrape(port), flush=True)  # noqa: T201
        with suppress(OSError):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the least there is: the server cannot be done
            client.settimeout(0.01)
            client.connect(("127.0.0.1", port))
            client.setblocking(False)
            clients.append((client, next(behaviours)(client)))
        for _, behaviour in clients:
            with suppress(OSError):
                next(behaviour, None)
        while len(clients) > 100:
            clients.pop(0)[0].close()


def tenfold(port: int) -> None:
    """Be hostile at ten times the rate."""
    hostile(port, 200.0)


def silent(_: socket.socket) -> Iterator[None]:
    """Connects, and says nothing."""
    yield


def malformed(client: socket.socket) -> Iterator[None]:
    """Speaks no HTTP."""
    client.sendall(b"\x00\xff nonsense\r\n\r\n")
    yield


def slow_writer(client: socket.socket) -> Iterator[None]:
    """Asks byte by byte, and never gets to the end."""
    for byte in b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 1000:
        client.sendall(bytes([byte]))
        yield


def slow_reader(client: socket.socket) -> Iterator[None]:
    """Asks for the page, and reads it byte by byte."""
    client.sendall(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n")
    while True:
        yield
        client.recv(1)


def another(port: int) -> None:
    """Serve a page that is no run's, until killed."""
    from distrain.monitor.pageserver import PageServer

    server = PageServer("127.0.0.1", port)
    server.page = b'distrain_a_metric{run="a",rank="0"} 1.0\n' * 400
    server.start()
    threading.Event().wait()


def run(folder: str, name: str, kind: str, times: list[float]) -> tuple[float, float, float]:
    """Images a second of a run, its own CPU seconds, and the page's share; ms of its scrapes are added to `times`."""
    import torch  # a client is a process of this file, and must not load it

    from distrain.config import parse
    from distrain.train import train
    from distrain.world import World

    (page, client, _), port = KINDS[kind], free_port()
    tree = {
        "run": f"{folder}/{name}",
        "epochs": EPOCHS,
        "global_batch": 64,
        "virtual_workers": 4,
        "data": {"train": f"{folder}/train", "val": f"{folder}/val", "pack": "digits"},
        "augment": {"crop": 64, "mirror": False, "colour": 0.0},
        "model": {"width": 0.25},
        "schedule": {"name": "constant", "lr": 0.01},
        "metrics": {"port": port if page == "own" else None, "linger": 0.0},
    }
    processes = [
        subprocess.Popen([sys.executable, __file__, role, str(port)], stdout=subprocess.PIPE, text=True)
        for role in (["another"] if page == "another's" else []) + ([client] if client else [])
    ]
    console, began = Speed(), time.process_time()
    try:
        train(parse(tree, "bench"), World(torch.device("cpu")), console)
    finally:
        for process in processes:
            process.kill()
            times += [ms for line in process.communicate()[0].splitlines() if not math.isnan(ms := float(line))]
    spent = time.process_time() - began
    return statistics.median(console.speeds[2:]), spent, console.page_seconds / spent


def main() -> None:
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    order = list(KINDS)
    with tempfile.TemporaryDirectory() as folder:
        run(folder, "warm-up", "without", [])
        for number in range(ROUNDS):
            for kind in order:
                found[kind].append(run(folder, f"{number}-{kind}".replace(" ", "-"), kind, times[kind]))
            order = [*order[1:], order[0]]
    results = {}
    for kind, (_, _, against) in KINDS.items():
        results[kind] = {"images/s": round(statistics.median(f[0] for f in found[kind]))}
        if against:
            pairs = list(zip(found[kind], found[against], strict=True))
            ms = times[kind]
            results[kind] |= {
                "against": against,
                "ratio of images/s": ratios(a[0] / b[0] for a, b in pairs),
                "ratio of CPU time": ratios(a[1] / b[1] for a, b in pairs),
                "the page's threads' share of CPU time": round(statistics.median(f[2] for f in found[kind]), 4),
                "ms a scrape": {
                    "median": round(statistics.median(ms), 1),
                    "99 of 100 within": round(statistics.quantiles(ms, n=100)[98], 1),
                    "highest": round(max(ms), 1),
                    "scrapes": len(ms),
                },
            }
    print(json.dumps(results, indent=1))  # noqa: T201


def ratios(each: Iterable[float]) -> dict[str, Any]:
    """Of the rounds."""
    values = sorted(each)
    return {"median": round(statistics.median(values), 3), "rounds": [round(value, 3) for value in values]}


if __name__ == "__main__":
    if sys.argv[1:]:
        roles = {"once_a_second": once_a_second, "hostile": hostile, "tenfold": tenfold, "another": another}
        roles[sys.argv[1]](int(sys.argv[2]))
    main()
