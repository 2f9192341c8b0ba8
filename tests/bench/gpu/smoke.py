"""Check that it runs at all: DALI on the GPU, the command line on the digits, NCCL: `smoke.py smoke SECONDS`."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common import DRY, TMP, Out, main
from device import DEVICE
from narrow import loader_sections
from photos import STATISTICS, encoded, picture, write_set
from short_runs import config, digits, run
from test_loader import by_id, requests
from torch import Tensor

from distrain.data.decoding.image import encode_ppm
from distrain.data.loader import Loader
from distrain.data.shards.dataset import Dataset

CPU = torch.device("cpu")
RECIPE = "configs/quickstart.yaml"
ON_DEVICE = f"device={'cpu' if DRY else 'cuda'}"
DEFAULT = "default device"
RUNS = {
    DEFAULT: [
        "epochs=1"
    ],  # it names no device: a machine with a GPU must use it by itself
    "fp32": [ON_DEVICE, "epochs=2"],
    "bf16": [ON_DEVICE, "epochs=1", "precision=bf16"],
    "tf32": [ON_DEVICE, "epochs=1", "precision=tf32"],
    "bytes": [ON_DEVICE, "epochs=1", "data.normalise=device"],
}
if DRY:
    RUNS = {name: RUNS[name] for name in (DEFAULT, "bytes")}


def smoke(out: Out) -> None:
    """Decode, train and all_reduce a little."""
    with out.guarded("dali"):
        began = time.monotonic()
        import nvidia.dali  # noqa: F401

        out("dali import", seconds=round(time.monotonic() - began, 1))
        out("mixed decode", **mixed())
    for name, overrides in RUNS.items():
        if not out.has(5, f"train, {name}"):
            return
        with out.guarded(f"train, {name}"):
            train(out, name, overrides)
    if not DRY:
        with out.guarded("nccl"):
            out("nccl", **nccl())


def train(out: Out, name: str, overrides: list[str]) -> None:
    """Run `distrain train` on the digits, and write down how its output begins and ends."""
    at = digits()
    folder = TMP / f"quick-{name.replace(' ', '-')}"
    began = time.monotonic()
    command = [
        sys.executable,
        "-W",
        "default",
        "-m",
        "distrain",
        "train",
        RECIPE,
        f"run={folder}",
    ]
    command += [
        f"data.train={at}/train",
        f"data.val={at}/val",
        "metrics.port=null",
        *overrides,
    ]
    code, text = run(command, min(60, out.left()) if not DRY else out.left())
    lines = text.splitlines()
    values: dict[str, Any] = {
        "code": code,
        "seconds": round(time.monotonic() - began, 1),
    }
    if code != 0:
        values["error"] = f"exit code {code}"
    else:
        values["device"] = device_of(folder)
        if not DRY and values["device"] != torch.cuda.get_device_name(DEVICE):
            values["error"] = "trained on another device than the GPU"
    if name == DEFAULT:
        values["start"] = lines[:12]
    out(f"train, {name}", **values, end=lines[-12:])


def device_of(folder: Path) -> str:
    """Return the name of the device that the last checkpoint of a run was made on."""
    newest = max(folder.glob("checkpoints/step-*/state.json"))
    return str(json.loads(newest.read_text())["environment"]["device"])


def mixed() -> dict[str, Any]:
    """Compare the images of the GPU's decoder with the CPU's, in levels of 255."""
    dataset = files(TMP / "mixed")
    found: dict[str, Any] = {}
    images: dict[tuple[torch.device, str], dict[int, Tensor]] = {}
    for device in (CPU, DEVICE):
        for normalise in ("loader", "device"):
            c = config(
                global_batch=8,
                virtual_workers=1,
                data={"train": "x", "normalise": normalise},
            )
            options: dict[str, Any] = {
                "batch_size": 8,
                "device": device,
                "use_augmentation": True,
            }
            with Loader(
                dataset,
                STATISTICS,
                requests(np.arange(16), 8),
                **loader_sections(c),
                **options,
            ) as loader:
                batches = list(loader)
            b = batches[0].pixels
            found[f"{device} {normalise}"] = (
                f"{tuple(b.shape)} {b.dtype} {b.device} {b.stride()}"
            )
            found[f"{device} {normalise} address mod 512"] = b.data_ptr() % 512
            images[device, normalise] = {k: v.cpu() for k, v in by_id(batches).items()}
    std = torch.tensor(STATISTICS.std, dtype=torch.float32)[:, None, None]
    for normalise in ("loader", "device"):
        cpu = images[CPU, normalise]
        gpu = images[DEVICE, normalise]
        off = [((cpu[k] - gpu[k]) * std).abs() for k in sorted(cpu)]
        found[f"levels off, mean, {normalise}"] = round(
            float(torch.stack([o.mean() for o in off]).mean()), 3
        )
        found[f"levels off, most, {normalise}"] = round(
            float(max(o.max() for o in off)), 1
        )
        found[f"levels off, mean by file, {normalise}"] = [
            round(float(o.mean()), 2) for o in off
        ]
    return found


def files(folder: Path) -> Dataset:
    """Write a set of 12 plain JPEGs, raw pixels, and JPEGs that are grey, progressive and 4:4:4."""
    made = [encoded(picture(i, 256, 256)) for i in range(12)]
    made.append(bytes(encode_ppm(picture(20, 256, 256))))
    made.append(encoded(picture(21, 256, 256), mode="L"))
    made.append(encoded(picture(22, 256, 256), progressive=True))
    made.append(encoded(picture(23, 256, 256), subsampling=0))
    return write_set(folder, made, (256, 256), proved=True)


def nccl() -> dict[str, Any]:
    """all_reduce as many int64 as alexnet has parameters, over a group of one rank."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29517", NCCL_SOCKET_IFNAME="lo"
    )
    began = time.monotonic()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", rank=0, world_size=1, device_id=DEVICE
    )
    x = torch.full((61_100_840,), 2**40 + 1, dtype=torch.int64, device=DEVICE)
    dist.all_reduce(x)
    torch.cuda.synchronize()
    is_equal = bool((x == 2**40 + 1).all())
    dist.destroy_process_group()
    assert is_equal, "all_reduce of one rank changed its input"
    return {
        "int64 all_reduce of one rank": is_equal,
        "seconds": round(time.monotonic() - began, 1),
    }


if __name__ == "__main__":
    main({"smoke": smoke})
