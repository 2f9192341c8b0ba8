"""What a version of distrain leaves behind, for the versions after it: `python tests/earlier/make.py FOLDER`.

A packed training set, an indexed validation set, a run directory in mid-run, and what the run has to end with:
the weights as a file, their hash, and the hash of what the hardware computes, on which the bits depend. Only the
command line is used, so that the script outlives the modules.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

CLASSES = ("aphid", "beetle", "cricket")
DISTRAIN = [sys.executable, "-m", "distrain"]


def picture(seed: int, label: int) -> bytes:
    """A JPEG file of 60 to 90 pixels, coarse patches with the class's colour."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 160, (4, 5, 3), dtype=np.uint8)
    coarse[..., label] += 80
    sink = io.BytesIO()
    size = (60 + seed % 31, 60 + seed % 23)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(
        sink, "JPEG", quality=85
    )
    return sink.getvalue()


def write_sources(folder: Path) -> None:
    """90 pictures in folders by class, and a tar of 45 others, one of which is damaged."""
    for i in range(90):
        file = folder / "photos" / CLASSES[i % 3] / f"{i:03d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i, i % 3))
    (folder / "indexed").mkdir()
    (folder / "names.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    with tarfile.open(folder / "indexed/val.tar", "w") as archive:
        for i in range(45):
            data = picture(1000 + i, i % 3)[: 200 if i == 7 else None]
            for suffix, content in (("jpg", data), ("cls", str(i % 3).encode())):
                entry = tarfile.TarInfo(f"{i:03d}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def recipe(folder: Path) -> dict[str, object]:
    """Dropout, batch normalisation, Adam's moments and a schedule with a memory: all that a checkpoint holds."""
    return {
        "run": str(folder / "run"),
        "epochs": 12,
        "global_batch": 16,
        "virtual_workers": 4,
        "device": "cpu",
        "data": {"train": str(folder / "packed"), "val": str(folder / "indexed")},
        "augment": {"crop": 40, "short_side": 48},
        "model": {"name": "alexnet_bn", "width": 0.02},
        "optimizer": {"name": "adam", "weight_decay": 1e-3, "decoupled": True},
        "schedule": {"name": "plateau", "lr": 2e-3, "warmup_epochs": 1, "patience": 2},
        "checkpoint": {"every": 7, "keep": 1},
        "log": {"every": 5},
        "metrics": {"port": None},
    }


def train(folder: Path, *, stop_at: int | None = None) -> None:
    """Train to the end, or ask the run to stop once it has logged a step."""
    process = subprocess.Popen([*DISTRAIN, "train", str(folder / "recipe.yaml")])
    while stop_at is not None and process.poll() is None:
        lines = [
            text
            for file in folder.glob("run/metrics-*.jsonl")
            for text in file.read_text().splitlines()
        ]
        if any(f'"step": {stop_at},' in text for text in lines):
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.01)
    if process.wait() not in (0, 128 + signal.SIGTERM):
        raise SystemExit(f"the training failed: exit code {process.returncode}")


def newest(run: Path) -> Path:
    """The newest checkpoint of a run directory."""
    return max((run / "checkpoints").glob("step-*"))


def main() -> None:
    folder = Path(sys.argv[1]).absolute()
    folder.mkdir(parents=True)
    write_sources(folder)
    pack = [str(folder / "photos"), str(folder / "packed"), "--geometry", "short:48"]
    subprocess.run([*DISTRAIN, "pack", *pack], check=True)
    index = [
        str(folder / "indexed"),
        "--names",
        str(folder / "names.txt"),
        "--max-rejects",
        "1",
    ]
    subprocess.run([*DISTRAIN, "index", *index], check=True)
    settings = recipe(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    train(folder, stop_at=20)
    shutil.copytree(folder / "run", folder / "half")
    train(folder)
    state = json.loads((newest(folder / "run") / "state.json").read_text())
    shutil.copy(
        newest(folder / "run") / "model.safetensors", folder / "final.safetensors"
    )
    expected = {
        "steps": state["step"],
        "hardware": state["hardware"],
        "plateau": state["plateau"],
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    (folder / "names.txt").unlink()
    shutil.rmtree(folder / "run")
    shutil.rmtree(folder / "photos")
    os.rename(folder / "half", folder / "run")


if __name__ == "__main__":
    main()
