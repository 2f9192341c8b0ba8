"""Measure a good plain loop on the same files, to compare with: `plain_loop.py peers SECONDS`.

DALI's own reader and recipe, torch's own network and fused SGD.
"""

import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from common import DATA, DRY, Out, main
from device import DEVICE, sync
from networks import CLASSES, Case
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch import Tensor

THREADS = len(os.sched_getaffinity(0))
SECONDS = 1.0 if DRY else 3.0
CASES = [
    Case(precision="bf16", batch=128),
    Case(precision="bf16", layout="channels_last", batch=1024),
    Case(precision="tf32", batch=1024),
    Case(precision="fp32", batch=128),
    Case(precision="bf16", batch=1024),
]
if DRY:
    CASES = [Case(precision="fp32", batch=16)]


def peers(out: Out) -> None:
    """Measure the loop in each case, and its loader alone in the first."""
    for case in CASES:
        for how in ("loop", "loader alone") if case is CASES[0] else ("loop",):
            if not DRY and not out.has(6, [how, *case]):
                return
            with out.guarded(" ".join(map(str, [how, *case]))):
                rate = measure(case, trains=how == "loop")
                values = {
                    "precision": case.precision,
                    "layout": case.layout,
                    "batch": case.batch,
                }
                out("peer", how=f"plain torch, {how}", **values, images_per_second=rate)


def batches(case: Case) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a function that gives images and labels, again and again."""
    files = json.loads((DATA / "files.json").read_text()) * 8
    labels = [i * 7919 % CLASSES for i in range(len(files))]
    layout = "HWC" if case.layout == "channels_last" else "CHW"

    @pipeline_def(
        batch_size=case.batch,
        num_threads=THREADS,
        device_id=None if DRY else 0,
        prefetch_queue_depth=3,
    )
    def pipeline() -> Any:
        jpegs, label = fn.readers.file(
            files=files, labels=labels, random_shuffle=True, name="reader"
        )
        images = fn.decoders.image(jpegs, device="cpu" if DRY else "mixed")
        images = fn.crop_mirror_normalize(
            images,
            crop=(224, 224),
            crop_pos_x=fn.random.uniform(range=(0, 1)),
            crop_pos_y=fn.random.uniform(range=(0, 1)),
            mirror=fn.random.coin_flip(),
            mean=[123.7, 116.3, 103.5],
            std=[58.4, 57.1, 57.4],
            dtype=types.FLOAT,
            output_layout=layout,
        )
        return images, label if DRY else label.gpu()

    iterator = DALIGenericIterator(
        [pipeline()], ["images", "labels"], reader_name="reader", auto_reset=True
    )

    def batch() -> tuple[Tensor, Tensor]:
        try:
            found = next(iterator)[0]
        except StopIteration:  # the end of an epoch; it has reset itself
            found = next(iterator)[0]
        images = found["images"]
        if layout == "HWC":
            images = images.permute(0, 3, 1, 2)
        return images, found["labels"].squeeze(-1).long()

    return batch


def measure(case: Case, trains: bool) -> int:
    """Return the images per second of the loop, or of its loader alone."""
    torch.backends.cudnn.benchmark = not DRY
    torch.backends.cuda.matmul.allow_tf32 = case.precision == "tf32"
    torch.backends.cudnn.allow_tf32 = case.precision == "tf32"
    model = torchvision.models.alexnet(num_classes=CLASSES).to(DEVICE)
    if case.layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True
    )
    batch = batches(case)

    def step() -> None:
        images, labels = batch()
        if not trains:
            return
        with torch.autocast(
            DEVICE.type, torch.bfloat16, enabled=case.precision == "bf16"
        ):
            loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    for _ in range(2 if DRY else 8):
        step()
    sync()
    began = time.monotonic()
    images = 0
    while time.monotonic() - began < SECONDS:
        step()
        images += case.batch
    sync()
    return round(images / (time.monotonic() - began))


if __name__ == "__main__":
    main({"peers": peers})
