"""Check bad files, decoders that are replaced, and what loaders leave behind: `rebuilds.py rebuilds SECONDS`."""

import gc
import os
import time
from typing import Any, NamedTuple

import torch
from common import DRY, TMP, Out, main
from device import DEVICE, memory_of_all, memory_of_process
from narrow import loader_sections
from photos import STATISTICS, encoded, picture, write_set
from short_runs import config
from test_loader import requests, resident

from distrain.data.loader import Loader
from distrain.data.shards.dataset import Dataset

TIMES = 4 if DRY else 40
LOADERS = 10
GROWTH = 128
"""MiB by which a process, and its share of the GPU's memory, may grow from the first quarter to the end."""


class Taken(NamedTuple):
    """What this process takes of the machine."""

    threads: int
    descriptors: int
    mib: int
    """Resident."""
    gpu_mib: int | None
    """None where the driver does not say."""
    gpu_mib_of_all: int
    """Of all processes."""

    @classmethod
    def now(cls) -> "Taken":
        """Look it up."""
        threads = len(os.listdir("/proc/self/task"))
        descriptors = len(os.listdir("/proc/self/fd"))
        return cls(
            threads, descriptors, resident() >> 20, memory_of_process(), memory_of_all()
        )


def leaks_and_rebuilds(out: Out) -> None:
    """Look for leaks, then read bad files."""
    with out.guarded("leaks"):
        leaks(out)
    rebuilds(out)


def leaks(out: Out) -> None:
    """Write down what is left after each of ten loaders, beside what there was before the first.

    The garbage collector is off: what only it would free counts as left.
    """
    files = [encoded(picture(i, 256, 256)) for i in range(32)]
    dataset = write_set(TMP / "leaks", files, (256, 256), proved=True)
    c = config(global_batch=8, virtual_workers=1, data={"train": "x"})
    options: dict[str, Any] = {
        "batch_size": 8,
        "device": DEVICE,
        "use_augmentation": False,
    }
    gc.collect()
    gc.disable()
    try:
        taken = [Taken.now()]
        for _ in range(LOADERS):
            with Loader(
                dataset,
                STATISTICS,
                requests(range(32), 8),
                **loader_sections(c),
                **options,
            ) as loader:
                for batch in loader:
                    del batch
            taken.append(Taken.now())
    finally:
        gc.enable()
    series = dict(zip(Taken._fields, zip(*taken, strict=True), strict=True))
    out("before the first loader and after each", loaders=LOADERS, **series)


def rebuilds(out: Out) -> None:
    """Read a set in which every fourth file is bad: each is named, no good one changes, and no memory is lost."""
    good = encoded(picture(0, 72, 72))
    broken = bytearray(good)
    table = good.index(b"\xff\xc4") + 5
    broken[table : table + 16] = b"\xff" * 16
    files = [bytes(broken) if i % 4 == 3 else good for i in range(64)]
    dataset = write_set(TMP / "rebuilds", files, (72, 72))
    taken: list[Taken] = []
    began = time.monotonic()
    while len(taken) < TIMES and out.has(
        4, f"rebuilds after the first {16 * len(taken)}"
    ):
        read(dataset)
        taken.append(Taken.now())
    if not taken:
        return
    seconds = time.monotonic() - began
    early, late = taken[len(taken) // 4], taken[-1]
    failure = {}
    if (
        late.mib - early.mib > GROWTH
        or (late.gpu_mib or 0) - (early.gpu_mib or 0) > GROWTH
    ):
        failure["error"] = f"memory has grown by more than {GROWTH} MiB"
    out(
        "rebuilds",
        rebuilds=16 * len(taken),
        ms_each=round(1000 * seconds / len(taken) / 17, 1),
        **{
            name: [
                taken[0]._asdict()[name],
                early._asdict()[name],
                late._asdict()[name],
            ]
            for name in Taken._fields
        },
        reasons=list(dataset.bad_samples.values())[:2],
        **failure,
    )


def read(dataset: Dataset) -> None:
    """Read the set once, with no memory of the bad files."""
    dataset.bad_samples.clear()
    c = config(
        global_batch=4, virtual_workers=1, data={"train": "x"}, augment={"crop": 64}
    )
    options: dict[str, Any] = {
        "batch_size": 4,
        "device": DEVICE,
        "use_augmentation": False,
    }
    with Loader(
        dataset, STATISTICS, requests(range(64), 4), **loader_sections(c), **options
    ) as loader:
        batches = list(loader)
        assert loader.num_decoder_rebuilds == 16, loader.num_decoder_rebuilds
    assert dataset.bad_samples.keys() == set(range(3, 64, 4)), sorted(
        dataset.bad_samples
    )
    assert all(torch.equal(b.images[0], batches[0].images[0]) for b in batches), (
        "a good image has changed"
    )


if __name__ == "__main__":
    main({"rebuilds": leaks_and_rebuilds})
