"""Times and ratios of cluster mode on this machine: `python tests/bench/cluster.py [start|death|throughput|save]...`.

Each comparison is a number of interleaved runs; what is printed is JSON with all of them and the ratio of the medians.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from sets import SetWriter

from distrain.data.decoding.image import encode_jpeg
from distrain.data.shards.stats import PixelMoments
from distrain.data.storage.store import Store

PLAIN_RAY = """
import os, sys, time
from distrain.launch.ray_cluster import RAY_HEAD_ENV, _RAY_TRAIN_ENV
os.environ.update(RAY_HEAD_ENV | _RAY_TRAIN_ENV)
import ray, ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

def entered(config):
    import torch
    torch.distributed.all_reduce(torch.ones(1))
    with open(config["out"], "a") as file:
        file.write(f"entered {os.getpid()}\\n")
    while not os.path.exists(config["out"] + ".end"):
        time.sleep(0.05)
        torch.distributed.all_reduce(torch.ones(1))

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
TorchTrainer(entered, train_loop_config={"out": sys.argv[1]}, scaling_config=ScalingConfig(num_workers=2),
    run_config=RunConfig(name="plain", storage_path=sys.argv[1] + ".ray",
    failure_config=FailureConfig(max_failures=-1))).fit()
"""


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def images(folder: Path, rows: int, side: int = 256) -> str:
    """A set of smooth noise, ten classes."""
    rng, moments = np.random.default_rng(0), PixelMoments()
    writer = SetWriter(
        Store(str(folder)), [str(c) for c in range(10)], (side, side), proved=True
    )
    for i in range(rows):
        pixels = (
            rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            .repeat(side // 8, 0)
            .repeat(side // 8, 1)
        )
        moments.add_image(pixels)
        writer.add(encode_jpeg(pixels, 90), i % 10, f"{i}.jpg")
    writer.finish(moments.to_statistics())
    return str(folder)


def recipe(folder: Path, **changes: object) -> Path:
    tree = {
        "epochs": 1,
        "device": "cpu",
        "schedule": {"name": "constant", "lr": 0.001},
        "log": {"every": 1},
        "checkpoint": {"every": 1_000_000},
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def lines_of(process: subprocess.Popen[str]) -> Iterator[tuple[float, str]]:
    assert process.stdout is not None
    for line in process.stdout:
        yield time.monotonic(), line.rstrip()


def launch(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )


def workers() -> list[int]:
    found = subprocess.run(
        ["pgrep", "-f", "ray::RayTrainWorker"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    return [int(pid) for pid in found.split()]


def distrain_times(folder: Path) -> dict[str, float]:
    """Seconds from the start of the command to the first step, and from a worker's death to the next step."""
    data = images(folder / "data", 640, 72)
    path = recipe(
        folder,
        data={"train": data},
        run=str(folder / "run"),
        epochs=400,
        global_batch=64,
        virtual_workers=4,
        augment={"crop": 64},
        model={"name": "alexnet", "width": 0.04},
        checkpoint={"every": 20},
    )
    began = time.monotonic()
    process = launch("-m", "distrain", "train", str(path), "--workers=2")
    found: dict[str, float] = {}
    killed, lost = 0.0, 0.0
    for at, line in lines_of(process):
        step = re.search(r"step (\d+)/", line)
        if "worker group formed" in line:
            found["died until formed" if killed else "start until formed"] = at - (
                killed or began
            )
        elif line.startswith("lost rank") and not lost:
            lost = at
            found["died until noticed"] = at - killed
        elif step and not killed and "start until first step" not in found:
            found["start until first step"] = at - began
        elif step and not killed and int(step[1]) > 60:
            killed = time.monotonic()
            os.kill(workers()[0], signal.SIGKILL)
        elif step and lost:
            found["died until next step"] = at - killed
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    return found


def plain_times(folder: Path) -> dict[str, float]:
    """The same of a Ray Train function that does nothing: until it is entered, and entered again."""
    script, out = folder / "plain.py", folder / "out"
    script.write_text(PLAIN_RAY)
    began = time.monotonic()
    process = launch(str(script), str(out))

    def entries(count: int) -> float:
        while not out.exists() or len(out.read_text().splitlines()) < count:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        return time.monotonic()

    found = {"start until entered": entries(2) - began}
    killed = time.monotonic()
    os.kill(workers()[0], signal.SIGKILL)
    found["died until entered"] = entries(4) - killed
    Path(f"{out}.end").touch()
    process.communicate(timeout=120)
    return found


def interleaved(
    times: int, **sides: Callable[[Path], dict[str, float]]
) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(times):
        for name, side in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(side(Path(folder)))
    return found


def median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def start_and_death(times: int = 3) -> dict[str, object]:
    runs = interleaved(times, plain=plain_times, distrain=distrain_times)
    plain, ours = runs["plain"], runs["distrain"]
    return {
        "runs": runs,
        "first step / plain Ray's entry": median(ours, "start until first step")
        / median(plain, "start until entered"),
        "group formed / plain Ray's entry": median(ours, "start until formed")
        / median(plain, "start until entered"),
        "next step / plain Ray's entry": median(ours, "died until next step")
        / median(plain, "died until entered"),
    }


def speed(folder: Path, flags: list[str], **settings: object) -> dict[str, float]:
    """Images per second after the first steps of AlexNet at 224 pixels."""
    path = recipe(folder, run=str(folder / "run"), **settings)
    process = launch("-m", "distrain", "train", str(path), *flags)
    out = process.communicate()[0]
    assert process.returncode == 0, out
    records = [
        json.loads(text)
        for text in (folder / "run/metrics-001.jsonl").read_text().splitlines()
    ][1:]
    batch = settings["global_batch"]
    assert isinstance(batch, int)
    return {
        "images/s": batch * len(records) / sum(r["seconds"] for r in records),
        "steps": len(records),
    }


def throughput(times: int = 3) -> dict[str, object]:
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as shared:
        data = images(Path(shared) / "data", 3072)
        for mode, batch in (
            ("fast", 1024),
            ("exact", 1024),
            ("fast", 128),
            ("exact", 128),
        ):
            settings = {
                "data": {"train": data},
                "global_batch": batch,
                "virtual_workers": batch // 32,
                "reduction": {"mode": mode},
            }
            if batch == 128:
                settings["data"] = {
                    "train": images(Path(shared) / f"small-{mode}", 1536)
                }

            def two(
                folder: Path, settings: dict[str, object] = settings
            ) -> dict[str, float]:
                return speed(folder, ["--workers=2"], **settings)

            def one(
                folder: Path, settings: dict[str, object] = settings
            ) -> dict[str, float]:
                return speed(folder, [], **settings)

            runs = interleaved(
                times if (mode, batch) == ("fast", 1024) else 2, one=one, two=two
            )
            found[f"{mode} {batch}"] = {
                "runs": runs,
                "two workers / one process": median(runs["two"], "images/s")
                / median(runs["one"], "images/s"),
            }
            sys.stderr.write(f"{mode} {batch}: {found[f'{mode} {batch}']}\n")
    return found


def saving() -> dict[str, object]:
    """CPU seconds of one full-width checkpoint, as a share of two cores for 30 s."""
    import torch

    from distrain.models.alexnet import AlexNet
    from distrain.rundir.checkpoint import CheckpointManager
    from distrain.rundir.lease import acquire_lease

    weights = AlexNet().build(1000, seed=0).state_dict()
    moments = {name: torch.randn_like(t) for name, t in weights.items()}
    costs = []
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        with acquire_lease(store, "bench", print) as lease:
            checkpoints = CheckpointManager(
                store, lease, keep_latest=2, retry_seconds=0, warn=print
            )
            for step in range(5):
                began = time.process_time()
                checkpoints.save(step, weights, moments, {}, best=None)
                checkpoints.wait()
                costs.append(time.process_time() - began)
    cost = statistics.median(costs)
    return {"CPU seconds of a save": costs, "share of two cores in 30 s": cost / 60}


if __name__ == "__main__":
    benches = {"start": start_and_death, "throughput": throughput, "save": saving}
    parser = argparse.ArgumentParser()
    parser.add_argument("part", nargs="?", choices=benches, help="Default: all.")
    chosen = parser.parse_args().part
    for name in [chosen] if chosen else benches:
        sys.stdout.write(json.dumps({name: benches[name]()}, indent=1) + "\n")
        sys.stdout.flush()
