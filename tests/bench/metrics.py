"""What the metrics page costs: `python tests/bench/metrics.py`.

Images a second of the quickstart's network with the page against without, in interleaved rounds of over a minute each:
read once a second; and read 20 times a second, beside malformed requests, clients that say nothing, clients that write
or read byte by byte, and over 1,000 connections a minute. And milliseconds of a scrape meanwhile. Clients are a process
of their own, on the same cores.
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
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

ROUNDS, EPOCHS = 3, 40


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


def hostile(port: int) -> None:
    """Scrape 20 times a second and misbehave, until killed."""
    clients: list[tuple[socket.socket, Iterator[None]]] = []
    behaviours = itertools.cycle([silent, silent, malformed, slow_writer, slow_reader])
    began = time.monotonic()
    for count in itertools.count():
        time.sleep(max(0.0, began + count * 0.05 - time.monotonic()))
        print(scrape(port), flush=True)  # noqa: T201
        with suppress(OSError):  # 20 a second: 1,200 a minute
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the least there is: the server cannot be done
            client.settimeout(0.01)
            client.connect(("127.0.0.1", port))
            clients.append((client, next(behaviours)(client)))
        for _, behaviour in clients:
            with suppress(OSError):
                next(behaviour, None)
        while len(clients) > 100:
            clients.pop(0)[0].close()


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


def run(folder: str, name: str, port: int | None, client: str | None, times: list[float]) -> tuple[float, float, float]:
    """Images a second of a run, its own CPU seconds, and the page's share; ms of its scrapes are added to `times`."""
    import torch  # a client is a process of this file, and must not load it

    from distrain.config import parse
    from distrain.train import train
    from distrain.world import World

    tree = {
        "run": f"{folder}/{name}",
        "epochs": EPOCHS,
        "global_batch": 64,
        "virtual_workers": 4,
        "data": {"train": f"{folder}/train", "val": f"{folder}/val", "pack": "digits"},
        "augment": {"crop": 64, "mirror": False, "colour": 0.0},
        "model": {"width": 0.25},
        "schedule": {"name": "constant", "lr": 0.01},
        "metrics": {"port": port, "linger": 0.0},
    }
    console, began = Speed(), time.process_time()
    command = [sys.executable, __file__, str(client), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True) if client else None
    try:
        train(parse(tree, "bench"), World(torch.device("cpu")), console)
    finally:
        if process:
            process.kill()
            times += [ms for line in process.communicate()[0].splitlines() if not math.isnan(ms := float(line))]
    spent = time.process_time() - began
    return statistics.median(console.speeds[2:]), spent, console.page_seconds / spent


def main() -> None:
    kinds = {"without": None, "read once a second": "once_a_second", "attacked": "hostile"}
    speeds: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS + 1):
            for kind, client in kinds.items():
                port = free_port() if client else None
                found = run(folder, f"{number}-{kind}", port, client, times[kind])
                if number:
                    speeds[kind].append(found)
            # Another order each round.
            kinds = dict([*list(kinds.items())[1:], *list(kinds.items())[:1]])
    medians = ({kind: statistics.median(f[i] for f in found) for kind, found in speeds.items()} for i in range(3))
    rate, cpu, page = medians
    found = {
        "images/s": {kind: round(value) for kind, value in rate.items()},
        "images/s, ratio": {kind: round(value / rate["without"], 3) for kind, value in rate.items()},
        "CPU time of the run, ratio": {kind: round(value / cpu["without"], 3) for kind, value in cpu.items()},
        "CPU time of the page's threads, of the run's": {kind: round(value, 4) for kind, value in page.items()},
        "ms a scrape": {
            kind: {
                "median": round(statistics.median(ms), 1),
                "99 of 100 within": round(statistics.quantiles(ms, n=100)[98], 1),
                "highest": round(max(ms), 1),
                "scrapes": len(ms),
            }
            for kind, ms in times.items()
            if ms
        },
    }
    print(json.dumps(found, indent=1))  # noqa: T201


if __name__ == "__main__":
    if sys.argv[1:]:
        {"once_a_second": once_a_second, "hostile": hostile}[sys.argv[1]](int(sys.argv[2]))
    main()
