"""One rank as a process of its own, without Ray: `one_rank.py CONFIG RANK RANKS MEETING_POINT [option=value...]`.

Prints what the console gets as lines, and at the end one JSON line: the summary, or how it failed.
"""

import dataclasses
import fcntl
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from distrain.config import load_config
from distrain.distributed.config import Cluster
from distrain.distributed.world import open_process_group
from distrain.errors import AttemptError, RunError, UserError
from distrain.monitor.health import group_timeout
from distrain.monitor.sinks import PlainConsole
from distrain.trainer import train


def meet_at(path: Path):
    """The lead's address goes through a file."""

    def meet(address: str) -> str:
        if address:
            partial = path.with_suffix(".partial")
            partial.write_text(address)
            partial.rename(path)
        while not path.exists():
            time.sleep(0.01)
        return path.read_text()

    return meet


def never(*_):
    raise BlockingIOError


def main() -> None:
    path, rank, ranks, meeting_point, *overrides = sys.argv[1:]
    problem, stall = None, Cluster().stall
    try:  # what is missing on one host alone has to end all ranks: they meet before, as Ray's do
        config = load_config(path, overrides)
        stall = config.cluster.stall
    except UserError as error:
        problem = error
    console = PlainConsole(sys.stdout)
    try:
        with open_process_group(
            torch.device("cpu"),
            int(rank),
            int(ranks),
            meet_at(Path(meeting_point)),
            timeout=group_timeout(stall),
            num_cores=1,
            launch_id=os.environ.get("LAUNCH_ID", "test"),
            on_checkpoint=lambda step, name: console.log(f"saved {step} {name}"),
        ) as world:
            with world.raise_on_all_ranks():
                if problem is not None:
                    raise problem
            signal.signal(signal.SIGUSR1, lambda *_: world.stop_requested.set())
            if (
                "NEVER_SERVE" in os.environ
            ):  # another rank holds the lock of the node's page
                fcntl.flock = never
            if "HANG_AT" in os.environ:  # a read that never comes back, on this rank
                hang(int(os.environ["HANG_AT"]))
            if (
                "SLOW" in os.environ
            ):  # every read takes so many seconds longer, on this rank
                slow(float(os.environ["SLOW"]))
            console.log("joined")
            out = {"status": "ok", **dataclasses.asdict(train(config, world, console))}
            out["needless"] = sorted(
                {"torch._dynamo", "torch._inductor", "sympy"} & sys.modules.keys()
            )
    except (UserError, AttemptError, RunError) as error:
        out = {"status": type(error).__name__, "text": str(error)}
    console.log(json.dumps(out))


def slow(seconds: float) -> None:
    """Make every read of rows take longer."""
    from distrain.data.shards.dataset import Dataset

    rows = Dataset.read_rows

    def later(self, ids):
        time.sleep(seconds)
        return rows(self, ids)

    Dataset.read_rows = later


def hang(calls: int) -> None:
    from distrain.data.shards.dataset import Dataset

    real, lock, count = Dataset.read_rows, threading.Lock(), [0]

    def rows(self, ids):
        with lock:
            count[0] += 1
        if count[0] > calls:
            time.sleep(3600)
        return real(self, ids)

    Dataset.read_rows = rows


if __name__ == "__main__":
    main()
