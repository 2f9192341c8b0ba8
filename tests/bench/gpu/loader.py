"""Measure the loader alone, beside bare decoders of the same files: `loader.py loader SECONDS`."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from common import DATA, DRY, Out, main
from device import DEVICE, sync
from narrow import loader_sections
from short_runs import config

from distrain.data.batch import iter_training_requests
from distrain.data.decoding import dali
from distrain.data.loader import Loader
from distrain.data.order import SampleOrder
from distrain.training.run_data import open_datasets

CORES = len(os.sched_getaffinity(0))
SECONDS = 0.5 if DRY else 1.6


class Reading(NamedTuple):
    """How a set is read."""

    set: str
    batch: int
    threads: int
    hw_load: float
    """Share of the JPEG engine."""
    normalise: str
    read_ahead: int = 2


CASES = [
    Reading("packed", 128, 2, 0.0, "loader"),
    Reading("packed", 128, CORES, 0.0, "loader"),
    Reading("packed", 128, CORES, 1.0, "loader"),
    Reading("packed", 128, CORES, 0.65, "loader"),
    Reading("packed", 16, CORES, 0.0, "loader"),
    Reading("packed", 512, CORES, 0.0, "device"),
    Reading("packed", 512, CORES, 0.65, "device"),
    Reading("packed", 512, CORES, 1.0, "device"),
    Reading("packed", 512, 8, 0.65, "device"),
    Reading("packed", 512, CORES, 0.35, "device", 3),
    Reading("packed", 512, CORES, 0.0, "loader", 4),
    Reading("raw", 512, 4, 0.0, "device", 3),
    Reading("as-is", 128, CORES, 0.0, "loader"),
    Reading("as-is", 512, CORES, 0.65, "device", 3),
    Reading("as-is", 512, CORES, 1.0, "device", 3),
    Reading("packed", 1024, CORES, 0.65, "device", 3),
    Reading("packed", 128, 8, 0.0, "loader"),
    Reading("raw", 512, 4, 0.0, "loader", 3),
]
DRY_CASES = [
    Reading("packed", 32, 2, 0.0, "loader"),
    Reading("as-is", 16, 2, 0.0, "device"),
    Reading("raw", 16, 2, 0.0, "device"),
]


def loader(out: Out) -> None:
    """Measure bare decoders, then the loader in each case."""
    files = [
        np.fromfile(path, np.uint8)
        for path in json.loads((DATA / "files.json").read_text())
    ]
    with out.guarded("libjpeg-turbo"):
        out(
            "bare",
            how=f"libjpeg-turbo, {CORES} threads",
            images_per_second=turbo(files),
        )
    if not DRY:
        with out.guarded("nvJPEG"):
            nvjpeg(out, files)
    for case in DRY_CASES if DRY else CASES:
        if not out.has(4, case):
            return
        with out.guarded(" ".join(map(str, case))):
            out("loader", **case._asdict(), **measure(case))


def turbo(files: list[Any]) -> int:
    """Decode all files on all cores, twice, and return the second rate."""
    import simplejpeg

    def decode(data: Any) -> Any:
        return simplejpeg.decode_jpeg(data, "RGB")

    with ThreadPoolExecutor(CORES) as pool:
        for _ in range(2):
            began = time.monotonic()
            list(pool.map(decode, files, chunksize=8))
    return round(len(files) / (time.monotonic() - began))


def nvjpeg(out: Out, files: list[Any]) -> None:
    """Decode files in batched calls on the GPU."""
    from torchvision.io import decode_jpeg

    tensors = [torch.from_numpy(data) for data in files]
    for n in (128, 1024):
        decode_jpeg(tensors[:n], device="cuda")
        sync()
        began = time.monotonic()
        for _ in range(4):
            decode_jpeg(tensors[:n], device="cuda")
        sync()
        rate = round(4 * n / (time.monotonic() - began))
        out("bare", how=f"torchvision's nvJPEG, batches of {n}", images_per_second=rate)


def measure(case: Reading) -> dict[str, float]:
    """Return the rate of the loader, its CPU time, and the seconds until it is under way."""
    dali.HARDWARE_DECODER_LOAD = case.hw_load
    began = time.monotonic()
    data = {
        "train": str(DATA / case.set),
        "decode_threads": case.threads,
        "normalise": case.normalise,
        "read_ahead": case.read_ahead,
    }
    augment = {"short_side": 256} if case.set == "as-is" else {}
    c = config(global_batch=case.batch, virtual_workers=1, data=data, augment=augment)
    dataset, _ = open_datasets(c)
    order = SampleOrder(dataset.manifest.rows_per_group, 0, 1, case.batch, 1024)
    requests = iter_training_requests(order, range(10**9), range(1))
    options: dict[str, Any] = {
        "batch_size": case.batch,
        "device": DEVICE,
        "use_augmentation": True,
    }
    images = 0
    with Loader(
        dataset, dataset.manifest.statistics, requests, **loader_sections(c), **options
    ) as batches:
        for _ in range(3):
            next(batches)
        first = time.monotonic() - began
        sync()
        began = time.monotonic()
        cpu = time.process_time()
        while time.monotonic() - began < SECONDS:
            for _ in range(max(1, 512 // case.batch)):
                images += len(next(batches).sample_ids)
        sync()
        wall = time.monotonic() - began
        spent = time.process_time() - cpu
    return {
        "images_per_second": round(images / wall),
        "cpu_ms": round(1000 * spent / images, 3),
        "cores_busy": round(spent / wall, 1),
        "start_s": round(first, 2),
    }


if __name__ == "__main__":
    main({"loader": loader})
