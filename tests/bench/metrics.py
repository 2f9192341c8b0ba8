"""What the metrics page costs: `python tests/bench/metrics.py`.

On the quickstart's network, by turns of a few seconds, so that what else the machine does meets both sides alike:

- A run whose page is read once a second, against the same run while its page is neither rendered nor read, and no norms
  are taken. These come every quarter of a minute by the clock, so that they cost the other turns twice.
- A run whose page is read 20 times a second, beside malformed requests, clients that say nothing, clients that write or
  read byte by byte, and over 1,000 connections a minute; against the same run while the page of another process is
  attacked, because attackers take time of the same cores, which the page is not to blame for.

It is one process each time, since two that do the same differ by up to three per cent. What the page costs by itself is
its threads' share in the CPU time of the run, and the training thread's share of time in calls for it.
"""

import argparse
import http.client
import itertools
import json
import math
import mmap
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

TURNS, SECONDS = 50, 3.0
BATCH, RATE = 64, 20.0
STARTED: list[subprocess.Popen[bytes]] = []


class Turn(NamedTuple):
    """What a run did, and what the metrics took of it."""

    seconds: float
    images: float
    cpu: float
    """CPU seconds of the run, the page's threads included."""
    page: float
    """Of these, those of the page's threads."""
    calls: float
    """Seconds that the training thread spent in calls for the metrics."""


TOLD, NUMBERS, SWITCH = struct.Struct("ddd"), struct.Struct("ddd?"), 24
"""What a run tells: steps that are done, CPU seconds of the page's threads, seconds of the training thread's calls; and
what it is told: whether its page is rendered."""


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scrape(port: int) -> None:
    """Print when it began, and how many milliseconds it took; nothing where it failed."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        with closing(connection):
            connection.request("GET", "/metrics")
            connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return
    print(began, 1000 * (time.monotonic() - began), flush=True)  # noqa: T201


def once_a_second(port: int) -> None:
    """Scrape until killed."""
    while True:
        time.sleep(1.0)
        scrape(port)


def hostile(port: int) -> None:
    """Scrape many times a second and misbehave as often, until killed."""
    clients: list[tuple[socket.socket, Iterator[None]]] = []
    behaviours = itertools.cycle([silent, silent, malformed, slow_writer, slow_reader])
    due = time.monotonic()
    while True:
        due = max(
            due + 1 / RATE, time.monotonic()
        )  # what was missed while it was stopped is not made up for
        time.sleep(max(0.0, due - time.monotonic()))
        scrape(port)
        with suppress(OSError):
            client = socket.socket()
            client.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVBUF, 1
            )  # the least there is: the server cannot be done
            client.settimeout(0.01)
            client.connect(("127.0.0.1", port))
            client.setblocking(False)
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


def another(port: int) -> None:
    """Serve a page that is no run's, until killed."""
    from distrain.monitor.pageserver import PageServer

    server = PageServer("127.0.0.1", port)
    server.page = b'distrain_a_metric{run="a",rank="0"} 1.0\n' * 400
    server.start()
    threading.Event().wait()


class Timed:
    """The time inside functions, on whichever thread."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            found = function(*arguments, **options)
            self.seconds += time.perf_counter() - began
            return found

        return call


class Teller:
    """A console that leaves the numbers of the run in a file."""

    def __init__(self, numbers: mmap.mmap, inside: "Timed") -> None:
        self._numbers, self._inside = numbers, inside

    def set_step(self, step: int) -> None:
        """So many steps are done."""
        page = [
            thread
            for thread in threading.enumerate()
            if "distrain-metrics" in thread.name
        ]
        seconds = [
            Path(f"/proc/self/task/{t.native_id}/schedstat").read_text().split()[0]
            for t in page
        ]
        TOLD.pack_into(
            self._numbers, 0, step, sum(map(int, seconds)) / 1e9, self._inside.seconds
        )

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_, **__: None


def run(port: int, folder: str) -> None:
    """Train until killed."""
    import torch  # a client is a process of this file, and must not load it

    from distrain.config import parse_config
    from distrain.distributed.world import World
    from distrain.monitor import prometheus
    from distrain.trainer import train

    with Path(folder, "numbers").open("r+b") as file:
        numbers = mmap.mmap(file.fileno(), NUMBERS.size)

    def when_on(function: Callable[..., None]) -> Callable[..., None]:
        return lambda *arguments: function(*arguments) if numbers[SWITCH] else None

    inside = Timed()
    for name in (
        "add_data_wait",
        "pop_mean_arrival_seconds",
        "count_step",
        "update_from_record",
        "snapshot_weights",
        "record_norms",
    ):
        setattr(
            prometheus.Metrics, name, inside.timed(getattr(prometheus.Metrics, name))
        )
    for owner, name in (
        (prometheus.MetricsEndpoint, "_publish_once"),
        (prometheus.Metrics, "snapshot_weights"),
    ):
        setattr(owner, name, when_on(getattr(owner, name)))
    tree = {
        "run": f"{folder}/run",
        "epochs": 100_000,
        "global_batch": BATCH,
        "virtual_workers": 4,
        "data": {"train": f"{folder}/train", "val": f"{folder}/val", "pack": "digits"},
        "augment": {"crop": 64, "mirror": False, "colour": 0.0},
        "model": {"width": 0.25},
        "schedule": {"name": "constant", "lr": 0.01},
        "evaluate": {"every": 1_000_000},
        "checkpoint": {"every": 1_000_000},
        "metrics": {"port": port},
    }
    train(
        parse_config(tree, "bench"), World(torch.device("cpu")), Teller(numbers, inside)
    )


class Run:
    """A process that trains."""

    def __init__(self, folder: Path) -> None:
        """Start, and wait until it is under way."""
        self.port, self._numbers = free_port(), folder / "numbers"
        self._numbers.write_bytes(bytes(NUMBERS.size))
        self.switch(on=True)
        self._process = start("run", self.port, str(folder))
        while self.now().images < 50 * BATCH:
            assert self._process.poll() is None
            time.sleep(0.1)

    def switch(self, *, on: bool) -> None:
        """Have its page rendered, or not."""
        with self._numbers.open("r+b") as file:
            file.seek(SWITCH)
            file.write(bytes([on]))

    def now(self) -> Turn:
        """All from the start."""
        steps, page, calls, _ = NUMBERS.unpack(self._numbers.read_bytes())
        fields = (
            Path(f"/proc/{self._process.pid}/stat")
            .read_text()
            .rpartition(")")[2]
            .split()
        )
        cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return Turn(time.monotonic(), steps * BATCH, cpu, page, calls)


class Side:
    """One of two that take turns: clients that go on in its turns, and are stopped (SIGSTOP) in the other's."""

    def __init__(
        self, run: Run, *clients: subprocess.Popen[bytes], page: bool = True
    ) -> None:
        self._run, self._clients, self._page = run, clients, page
        self.windows: list[tuple[float, float]] = []
        self.turns: list[Turn] = []
        self._signal(signal.SIGSTOP)

    def turn(self) -> None:
        """Go on for a while."""
        self._run.switch(on=self._page)
        self._signal(signal.SIGCONT)
        before = self._run.now()
        time.sleep(SECONDS)
        after = self._run.now()
        self._signal(signal.SIGSTOP)
        self.windows.append((before.seconds, after.seconds))
        self.turns.append(Turn(*(b - a for a, b in zip(before, after, strict=True))))

    def _signal(self, number: signal.Signals) -> None:
        for client in self._clients:
            client.send_signal(number)


def on_against_off(folder: Path) -> dict[str, Any]:
    """One run, whose page is rendered and read once a second in half of the turns."""
    run, log = Run(folder), folder / "once-a-second"
    client = start("once_a_second", run.port, log=log)
    return by_turns(Side(run, client), Side(run, page=False), log)


def attacked_against_another(folder: Path) -> dict[str, Any]:
    """One run, whose page is attacked in half of the turns; in the others the page of another process is."""
    run, port, log = Run(folder), free_port(), folder / "attack"
    start("another", port)
    own, another = (
        start("hostile", run.port, log=log),
        start("hostile", port, log=folder / "other-attack"),
    )
    return by_turns(Side(run, own), Side(run, another), log)


def by_turns(one: Side, other: Side, log: Path) -> dict[str, Any]:
    """The ratios of two sides, and what the page cost on the first one, whose scrapes are in the log."""
    for number in range(TURNS):
        for side in (one, other) if number % 2 else (other, one):
            side.turn()
    whole = Turn(*map(sum, zip(*one.turns, strict=True)))
    scrapes = [
        [float(word) for word in line.split()] for line in log.read_text().splitlines()
    ]
    ms = [
        ms
        for at, ms in scrapes
        if any(a <= at and at + ms / 1000 <= b for a, b in one.windows)
    ]
    return {
        "ratio of images/s": compared(one.turns, other.turns, "images", "seconds"),
        "ratio of CPU time an image": compared(one.turns, other.turns, "cpu", "images"),
        "the page's threads' share of CPU time": round(whole.page / whole.cpu, 4),
        "the training thread's share of time in calls": round(
            whole.calls / whole.seconds, 4
        ),
        "ms a scrape": {
            "median": round(statistics.median(ms), 1),
            "99 of 100 within": round(statistics.quantiles(ms, n=100)[98], 1),
            "highest": round(max(ms), 1),
            "scrapes": len(ms),
        },
    }


def start(
    role: str, port: int, *arguments: str, log: Path | None = None
) -> subprocess.Popen[bytes]:
    """A process of this file; what it prints goes to a file, since a pipe that nobody reads would stop it."""
    command = [sys.executable, __file__, role, str(port), *arguments]
    with (log or Path(os.devnull)).open("w") as out:
        STARTED.append(subprocess.Popen(command, stdout=out))
    return STARTED[-1]


def main() -> None:
    for part in (on_against_off, attacked_against_another):
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = json.dumps(part(Path(folder)), indent=1)
                print(part.__name__, result, flush=True)  # noqa: T201
            finally:
                while STARTED:
                    STARTED[-1].kill()
                    STARTED.pop().wait()


def compared(
    ours: list[Turn], theirs: list[Turn], what: str, per: str
) -> dict[str, float]:
    """The ratio over all turns, and its standard error: that of the mean over tenths of them."""

    def rate(turns: list[Turn]) -> float:
        return float(
            sum(getattr(t, what) for t in turns) / sum(getattr(t, per) for t in turns)
        )

    tenths = [slice(i * TURNS // 10, (i + 1) * TURNS // 10) for i in range(10)]
    ratios = [rate(ours[part]) / rate(theirs[part]) for part in tenths]
    error = statistics.stdev(ratios) / math.sqrt(10)
    return {
        "all turns": round(rate(ours) / rate(theirs), 4),
        "standard error": round(error, 4),
    }


if __name__ == "__main__":
    roles = {
        "run": run,
        "once_a_second": once_a_second,
        "hostile": hostile,
        "another": another,
    }
    parser = argparse.ArgumentParser()
    # How main starts this file again, for the processes that it measures.
    parser.add_argument("role", nargs="?", choices=roles, help=argparse.SUPPRESS)
    parser.add_argument("port", nargs="?", type=int, help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        roles[args.role](args.port, *args.rest)
    else:
        main()
