"""What the metrics page costs: `python tests/bench/metrics.py`.

Images a second of the quickstart's network with the page against without, in interleaved rounds: read once a second;
and read 20 times a second, beside malformed requests, clients that say nothing and over 1,000 connections a minute. And
milliseconds of a scrape meanwhile.
"""

import http.client
import json
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any

import torch

from distrain.config import parse
from distrain.train import train
from distrain.world import World

ROUNDS, EPOCHS = 5, 4


class Speed:
    """A console that keeps the speeds."""

    def __init__(self) -> None:
        self.speeds: list[float] = []

    def record(self, record: Any) -> None:
        """A line of metrics."""
        if record["kind"] == "train":
            self.speeds.append(record["images_per_second"])

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_, **__: None


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scrape(port: int, times: list[float]) -> None:
    began = time.perf_counter()
    with (
        suppress(OSError, http.client.HTTPException),
        closing(http.client.HTTPConnection("127.0.0.1", port, timeout=2)) as c,
    ):
        c.request("GET", "/metrics")
        c.getresponse().read()
        times.append(1000 * (time.perf_counter() - began))


def once_a_second(port: int, end: threading.Event, times: list[float]) -> None:
    while not end.wait(1.0):
        scrape(port, times)


def hostile(port: int, end: threading.Event, times: list[float]) -> None:
    silent: list[socket.socket] = []
    count = 0
    while not end.wait(0.05):
        scrape(port, times)
        count += 1
        with suppress(OSError):
            silent.append(socket.create_connection(("127.0.0.1", port), timeout=1))  # 20 a second: 1,200 a minute
        if count % 5 == 0:
            with suppress(OSError), closing(socket.create_connection(("127.0.0.1", port), timeout=1)) as raw:
                raw.sendall(b"\x00\xff nonsense\r\n\r\n")
        while len(silent) > 100:
            silent.pop(0).close()
    for client in silent:
        client.close()


def run(folder: str, name: str, port: int | None, client: Callable[..., None] | None, times: list[float]) -> float:
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
    console, end = Speed(), threading.Event()
    thread = threading.Thread(target=client, args=(port, end, times)) if client else None
    if thread:
        thread.start()
    train(parse(tree, "bench"), World(torch.device("cpu")), console)
    end.set()
    if thread:
        thread.join()
    return statistics.median(console.speeds[2:])


def main() -> None:
    kinds: dict[str, Any] = {"without": None, "read once a second": once_a_second, "attacked": hostile}
    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS + 1):
            for kind, client in kinds.items():
                port = free_port() if client else None
                speed = run(folder, f"{number}-{kind}", port, client, times[kind])
                if number:
                    speeds[kind].append(speed)
            # Another order each round.
            kinds = dict([*list(kinds.items())[1:], *list(kinds.items())[:1]])
    medians = {kind: statistics.median(found) for kind, found in speeds.items()}
    found = {
        "images/s": {kind: round(value) for kind, value in medians.items()},
        "ratio": {kind: round(value / medians["without"], 3) for kind, value in medians.items()},
        "ms a scrape": {
            kind: {"median": round(statistics.median(ms), 1), "highest": round(max(ms), 1), "scrapes": len(ms)}
            for kind, ms in times.items()
            if ms
        },
    }
    print(json.dumps(found, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
