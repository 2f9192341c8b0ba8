"""The figures of the GPU run sheet: `python tests/bench/gpu.py FILE`. Stops sweeping when its time is over."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from photos import encoded, picture

from distrain import bench
from distrain.data import dali
from distrain.data.pack import Geometry, Treatment, pack
from distrain.data.sources import open_source
from distrain.layers import micro_step
from distrain.losses import cross_entropy
from distrain.model import build
from distrain.sections import AlexNet, AlexNet2012, AlexNetBN
from distrain.world import environment

SECONDS = 200
IMAGES = 4096
BATCH = 512


def photographs(folder: Path) -> Path:
    """A thousand noisy 500 x 375 JPEGs, linked four times each, of two classes."""
    rng = np.random.default_rng(0)
    for i in range(1024):
        noisy = picture(i, 375, 500) + rng.normal(0, 4, (375, 500, 3))
        data = encoded(np.clip(noisy, 0, 255).astype(np.uint8), quality=90)
        for copy in range(IMAGES // 1024):
            place = folder / "ab"[i % 2] / f"{i:04d}-{copy}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
    return folder


def step_rates(device: torch.device) -> dict[str, int]:
    """Images per second of forward and backward on images that are there."""
    found = {}
    for network in (AlexNet(), AlexNet2012(), AlexNetBN()):
        model = build(network, 1000, seed=0).to(device)
        for dtype in (torch.float32, torch.bfloat16):
            images, labels = torch.randn(BATCH, 3, 224, 224, device=device), torch.arange(BATCH, device=device)
            for repeat in range(25):
                if repeat == 5:
                    torch.cuda.synchronize()
                    began = time.monotonic()
                with micro_step(0, repeat, 0), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                    loss = cross_entropy(model(images).float(), labels).sum()
                torch.autograd.grad(loss, list(model.parameters()))
            torch.cuda.synchronize()
            found[f"{network.name} forward and backward {dtype}"] = round(20 * BATCH / (time.monotonic() - began))
    return found


def loader_rates(sets: dict[str, list[str]], until: float) -> list[dict[str, Any]]:
    """Images per second of each geometry, over threads, hardware decoder load and where pixels are normalised."""
    found = []
    cores = len(os.sched_getaffinity(0))
    for load in (0.0, 0.65, 1.0):
        for threads in sorted({4, 8, cores}, reverse=True):
            for place in ("loader", "device"):
                for name, (url, *overrides) in sets.items():
                    if (name == "raw" and load) or time.monotonic() > until:
                        continue
                    dali.HARDWARE_DECODER_LOAD = load
                    changes = [f"data.decode_threads={threads}", f"global_batch={BATCH}", f"data.normalise={place}"]
                    measured = bench.data(bench.settings(url, [*changes, *overrides]), IMAGES)
                    rates = {rate.name: round(rate.images_per_second) for rate in measured.rates}
                    point = {"threads": threads, "hw_decoder_load": load, "normalise": place}
                    found.append({"geometry": name, **point, "images/s": rates})
    return found


def guarded(what: Callable[[], Any]) -> Any:
    """What failed is written down, and does not keep the rest from being measured."""
    try:
        return what()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(target: str) -> None:
    began, device = time.monotonic(), torch.device("cuda", 0)
    found: dict[str, Any] = {
        "environment": environment(device),
        "cores": len(os.sched_getaffinity(0)),
        "gpu_tests_exit_code": int(os.environ.get("GPU_TESTS", -1)),
        "step images/s": guarded(lambda: step_rates(device)),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = str(photographs(folder / "photos"))
        sets = {}
        for kind, geometry, encoding, overrides in (
            ("packed", "square:256", "jpeg", []),
            ("as-is", "keep", "jpeg", ["augment.short_side=256"]),
            ("raw", "square:256", "raw", []),
        ):
            pack(open_source(photos).source, str(folder / kind), Treatment(Geometry.parse(geometry), encoding))
            sets[kind] = [str(folder / kind), *overrides]
        found["loader"] = guarded(lambda: loader_rates(sets, began + SECONDS))
    found["seconds"] = round(time.monotonic() - began)
    Path(target).write_text(json.dumps(found, indent=1))
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
