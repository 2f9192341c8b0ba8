"""Check that DALI does not overwrite a batch that the GPU still has to read: `race.py race SECONDS`.

The device is held back by a sleep before each batch's checksum, so that the host runs far ahead, as it does where
training is bound by the GPU.
"""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from common import DRY, TMP, Out, main
from device import DEVICE, sync
from narrow import loader_sections
from photos import STATISTICS, encoded, picture, write_set
from short_runs import config
from test_loader import requests
from torch import Tensor

from distrain.data.decoding.dali import DaliDecoder
from distrain.data.loader import Loader
from distrain.data.shards.dataset import Dataset

IMAGES = 64 if DRY else 256
BATCHES, SIZE = (6, 16) if DRY else (48, 64)
SLEEP = 20_000_000
"""Cycles of the GPU: about 12 ms."""
AS_LOADED = "as the loader has it"
HOSTS = (("waits", 4), ("drops", 2), ("drops", 4), ("keeps", 4))
"""What the host does with a batch whose checksum it has launched, and how many batches the loader reads ahead."""


def dali_memory(decoder: Any) -> Tensor:
    """Run a decoder's pipeline, and return DALI's own memory."""
    (images,) = decoder._pipeline.run()
    return torch.utils.dlpack.from_dlpack(images.as_tensor())


def dali_memory_on_stream(decoder: Any) -> Tensor:
    """Return DALI's own memory, which it makes ready in the order of torch's stream."""
    (images,) = decoder._pipeline.run(torch.cuda.current_stream())
    return torch.utils.dlpack.from_dlpack(images.as_tensor())


MEMORIES: dict[str, Callable[[Any], Tensor]] = {
    AS_LOADED: DaliDecoder.decode_batch,
    "DALI's own": dali_memory,
}
if not DRY:
    MEMORIES["DALI's own, run(torch's stream)"] = dali_memory_on_stream


def race(out: Out) -> None:
    """Count the batches whose checksum differs from that of a host that waits for each."""
    files = [encoded(picture(i, 256, 256), quality=95) for i in range(IMAGES)]
    dataset = write_set(TMP / "race", files, (256, 256), proved=True)
    for normalise in ("loader", "device"):
        with out.guarded(normalise):
            true = checksums(dataset, normalise, "waits", 2)
            for memory in MEMORIES:
                compare(out, dataset, normalise, memory, true)


def compare(
    out: Out, dataset: Dataset, normalise: str, memory: str, true: Tensor
) -> None:
    """Hand batches out in one kind of memory. As the loader has it they must never be wrong."""
    with patch.object(DaliDecoder, "decode_batch", MEMORIES[memory]):
        for host, ahead in HOSTS:
            if MEMORIES[memory] is dali_memory_on_stream and host in ("waits", "keeps"):
                continue
            case = {
                "memory": memory,
                "normalise": normalise,
                "host": host,
                "read_ahead": ahead,
            }
            if not out.has(3, case):
                continue
            wrong = int((checksums(dataset, normalise, host, ahead) != true).sum())
            failure = (
                {"error": f"{wrong} of {BATCHES} batches"}
                if wrong and memory == AS_LOADED
                else {}
            )
            out(
                "batches that were overwritten",
                **case,
                wrong=wrong,
                of=BATCHES,
                **failure,
            )


def checksums(dataset: Dataset, normalise: str, host: str, ahead: int) -> Tensor:
    """Return the sum of the pixels of each batch."""
    ids = np.random.default_rng(0).integers(
        0, IMAGES, BATCHES * SIZE
    )  # no batch like another
    data = {
        "train": "x",
        "normalise": normalise,
        "read_ahead": ahead,
        "decode_threads": 8,
    }
    c = config(global_batch=SIZE, virtual_workers=1, data=data)
    found = torch.zeros(BATCHES, dtype=torch.float64, device=DEVICE)
    kept = []
    options: dict[str, Any] = {
        "batch_size": SIZE,
        "device": DEVICE,
        "use_augmentation": True,
    }
    with Loader(
        dataset, STATISTICS, requests(ids, SIZE), **loader_sections(c), **options
    ) as loader:
        for i in range(BATCHES):  # enumerate would keep each batch until the next one
            batch = next(loader)
            if host != "waits" and not DRY:
                torch.cuda._sleep(SLEEP)
            found[i] = batch.pixels.double().sum()
            if host == "waits":
                sync()
            if host == "keeps":
                kept.append(batch)
            del batch
    sync()
    return found.cpu()


if __name__ == "__main__":
    main({"race": race})
