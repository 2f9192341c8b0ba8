"""Check that a run's weights do not depend on how it is run: `exact.py exact SECONDS`.

Threads, reading ahead, lanes, stops, kills, ranks, and a host that runs ahead of the GPU or waits for it.
`exact.py _train CONFIG` and `exact.py _rank CONFIG RANK` are the processes that it starts; they print their weights.
"""

import itertools
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from common import DATA, DRY, LEFT_OUT, TMP, Out, main, wait_for
from device import DEVICE, sync
from one_rank import meet_at
from short_runs import Quiet, config, digits, run

import distrain.trainer
from distrain.distributed.world import World, open_process_group

DIGITS = "digits"
WIDTH = 0.05 if DRY else 0.25
MOST = 300 if DRY else 40
"""Seconds that another process may take."""
STOP_AT = 17
OTHERS: dict[str, dict[str, Any]] = {
    "alexnet_bn": {"model": {"name": "alexnet_bn", "width": WIDTH}},
    "alexnet2012, lars": {
        "model": {"name": "alexnet2012", "width": WIDTH},
        "optimizer": {"name": "lars"},
        "schedule": {"name": "constant", "lr": 0.5},
    },
    "adam, hinge": {
        "optimizer": {"name": "adam"},
        "loss": {"name": "hinge", "form": "crammer_singer"},
        "schedule": {"name": "constant", "lr": 1e-4},
    },
}


def recipe() -> dict[str, Any]:
    """Return the config of a short run on the digits."""
    return {
        "data": {"train": str(digits() / "train"), "decode_threads": 2},
        "augment": {"crop": 64, "mirror": False},
        "model": {"name": "alexnet", "width": WIDTH},
        "global_batch": 64,
        "virtual_workers": 4,
        "epochs": 1 if DRY else 2,
        "schedule": {"name": "constant", "lr": 0.02},
    }


class Weights:
    """Writes down the weights of runs, and compares them with the first of their family."""

    def __init__(self, out: Out) -> None:
        """`out`: gets a line for each run."""
        self._out = out
        self._first: dict[str, str] = {}
        self._numbers = itertools.count()

    def compare(self, family: str, how: str, weights: str, **values: Any) -> None:
        """Report the weights of a run, which must be those of the family's first."""
        first = self._first.setdefault(family, weights)
        failure = (
            {}
            if weights == first
            else {"error": f"other weights than the family's first run, {first}"}
        )
        self._out("run", how=how, weights=weights, **values, **failure)

    def train(
        self, family: str, how: str, tree: dict[str, Any], stop_at: int | None = None
    ) -> None:
        """Train here; a run without a `run` directory gets one of its own."""
        began = time.monotonic()
        world = World(DEVICE)
        own = {"run": f"{TMP}/exact-{next(self._numbers)}"}
        summary = distrain.trainer.train(
            config(**{**own, **tree}), world, Quiet(world, stop_at=stop_at)
        )
        values = {
            "status": summary.status,
            "seconds": round(time.monotonic() - began, 1),
        }
        self.compare(family, how, summary.weights[:16], **values)


def exact(out: Out) -> None:
    """Train the same again and again, each time in another way."""
    base = recipe()
    weights = Weights(out)
    with out.guarded(DIGITS):
        in_one_process(weights, base)
    with out.guarded("kill -9"):
        killed(out, weights, base)
    with out.guarded("two ranks"):
        two_ranks(out, weights, base)
    with out.guarded("others"):
        for name, changes in OTHERS.items():
            if out.has(8, name):
                weights.train(name, f"{name}, 1", {**base, **changes})
                weights.train(
                    name,
                    f"{name}, 2",
                    {**base, **changes, "data": {**base["data"], "decode_threads": 7}},
                )
    large(out, weights)


def in_one_process(weights: Weights, base: dict[str, Any]) -> None:
    """Train the digits in one process."""
    data = base["data"]
    weights.train(DIGITS, "plain", base)
    weights.train(DIGITS, "plain again", base)
    weights.train(
        DIGITS, "decode_threads=1", {**base, "data": {**data, "decode_threads": 1}}
    )
    more = {**data, "decode_threads": 8, "read_ahead": 4}
    weights.train(DIGITS, "decode_threads=8, read_ahead=4", {**base, "data": more})
    weights.train(DIGITS, "lanes=2", {**base, "lanes": 2})
    stopped = {**base, "run": f"{TMP}/exact-stop"}
    weights.train(f"stopped at {STOP_AT}", f"stopped at {STOP_AT}", stopped, STOP_AT)
    weights.train(DIGITS, f"stopped at {STOP_AT}, resumed", stopped)


def large(out: Out, weights: Weights) -> None:
    """Train the whole network at 224 pixels: with the host far ahead of the GPU, and waiting for it."""
    if not wait_for(DATA / "packed.ready", out.left() - 5):
        out(LEFT_OUT, part="large: the data set was not ready")
        return
    base = {
        "data": {"train": str(DATA / "packed"), "decode_threads": 8},
        "model": {"name": "alexnet", "width": 0.1 if DRY else 1.0},
        "global_batch": 16 if DRY else 512,
        "virtual_workers": 2,
        "epochs": 1,
        "log": {"every": 1000},
    }
    original = distrain.trainer.forward_backward_step

    def waiting(*arguments: Any) -> None:
        original(*arguments)
        sync()

    for precision in ("fp32",) if DRY else ("fp32", "bf16"):
        for name, function in (
            ("host ahead", original),
            ("host waits", waiting),
            ("host ahead again", original),
        ):
            family = f"large, {precision}"
            if not out.has(6, f"{family}, {name}"):
                return
            with (
                out.guarded(f"{family}, {name}"),
                patch.object(distrain.trainer, "forward_backward_step", function),
            ):
                weights.train(
                    family,
                    f"{family}, {name}",
                    {**base, "precision": precision},
                    3 if DRY else 24,
                )


def killed(out: Out, weights: Weights, base: dict[str, Any]) -> None:
    """Kill a run after a checkpoint, and resume it."""
    run_at = Path(f"{TMP}/exact-kill")
    path = write_config(
        "kill.json",
        {**base, "run": str(run_at), "checkpoint": {"every": 5}, "log": {"every": 1}},
    )
    command = [sys.executable, __file__, "_train", str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + min(MOST, out.left())
    while time.monotonic() < end and process.poll() is None:
        records = sum(
            len(file.read_text().splitlines())
            for file in run_at.glob("metrics-*.jsonl")
        )
        if records >= 13 and list(run_at.glob("checkpoints/*/manifest.json")):
            break
        time.sleep(0.005)
    process.kill()
    was_killed = process.wait() == -signal.SIGKILL
    code, text = run(command, min(MOST, out.left()))
    if code != 0:
        raise RuntimeError(
            f"the resumed run ended with exit code {code}: {text[-300:]}"
        )
    weights.compare(
        DIGITS, "kill -9, resumed", printed_weights(text), was_killed=was_killed
    )


def two_ranks(out: Out, weights: Weights, base: dict[str, Any]) -> None:
    """Train over two ranks on one GPU, which NCCL refuses: gloo carries the tensors instead."""
    path = write_config("ranks.json", {**base, "run": f"{TMP}/exact-ranks"})
    pipes: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "_rank", str(path), str(rank)], **pipes
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            process.wait(max(1.0, min(MOST + 5, out.left())))
    except subprocess.TimeoutExpired as expired:
        for process in processes:
            process.kill()
        expired.output = "\n".join(
            process.communicate()[0][-300:] for process in processes
        )
        raise
    texts = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(
            f"{[process.returncode for process in processes]}: {[text[-250:] for text in texts]}"
        )
    for rank, text in enumerate(texts):
        weights.compare(
            DIGITS, f"two ranks on one device, gloo, rank {rank}", printed_weights(text)
        )


def write_config(name: str, tree: dict[str, Any]) -> Path:
    """Write what another process makes its config of."""
    path = TMP / name
    path.write_text(json.dumps(tree))
    return path


def train_here(path: str, world: World) -> None:
    """Train, and print the weights as `printed_weights` finds them."""
    summary = distrain.trainer.train(
        config(**json.loads(Path(path).read_text())), world, Quiet()
    )
    print(f"weights {summary.weights[:16]}")  # noqa: T201


def printed_weights(text: str) -> str:
    """Find the weights in what another process has printed."""
    found = re.search(r"^weights (\w+)$", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"no weights were printed: {text[-300:]}")
    return found[1]


def rank_here(path: str, rank: int) -> None:
    """Be one of two ranks."""
    original = dist.init_process_group

    def over_gloo(backend: str, **options: Any) -> None:
        original(
            "gloo",
            **{name: value for name, value in options.items() if name != "device_id"},
        )

    with (
        patch.object(dist, "init_process_group", over_gloo),
        open_process_group(
            DEVICE,
            rank,
            2,
            meet_at(TMP / "meet"),
            timeout=MOST,
            num_cores=1,
            launch_id="sheet",
        ) as world,
    ):
        train_here(path, world)


if __name__ == "__main__":
    if sys.argv[1] == "_train":
        train_here(sys.argv[2], World(DEVICE))
    elif sys.argv[1] == "_rank":
        rank_here(sys.argv[2], int(sys.argv[3]))
    else:
        main({"exact": exact})
