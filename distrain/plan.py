"""What a config comes to, without training: every derived number, for `--dry-run`."""

import numpy as np
from numpy.typing import NDArray

from distrain.config import Config
from distrain.data.digits import DIGITS_CLASSES, DIGITS_GROUP_ROWS
from distrain.data.manifest import MANIFEST, Manifest
from distrain.data.store import Store
from distrain.job import open_data, order_of, pin_data, streams_bytes
from distrain.model import parameter_count
from distrain.optim.schedule import learning_rate

_MOMENTS = {"sgd": 1, "lars": 1, "adam": 2}


def rates(config: Config, rows: int) -> list[tuple[int, float, float]]:
    """The learning rate at `rows` steps spread evenly over the run, the last one among them: (step, epoch, rate)."""
    per_epoch = order_of(config, _group_rows(config)).steps
    steps = config.epochs * per_epoch
    picked = sorted({round(i * (steps - 1) / max(1, rows - 1)) for i in range(rows)})
    return [(step, step / per_epoch, learning_rate(config.schedule, step, per_epoch, steps)) for step in picked]


def _group_rows(config: Config) -> NDArray[np.int64]:
    if config.data.pack and not Store(config.data.train).exists(MANIFEST):
        return DIGITS_GROUP_ROWS
    return open_data(config)[0].manifest.group_rows


def plan(config: Config, ranks: int) -> dict[str, str]:
    """Name and value of each derived number, as text; what only the data tells is said to be unknown without it.

    Raises:
        UserError: the data does not fit the config.
    """
    hosted = -(-config.virtual_workers // ranks)
    numbers = {
        "run directory": str(config.run),
        "global batch": f"{config.global_batch} = {config.virtual_workers} virtual workers x {config.micro_batch}",
        "virtual workers a rank": f"{hosted} on {ranks} rank{'s' * (ranks > 1)}",
    }
    store = Store(config.data.train)
    if config.data.pack and not store.exists(MANIFEST):
        group_rows, classes = DIGITS_GROUP_ROWS, DIGITS_CLASSES
        data = {"data": f"not packed yet: training packs the {config.data.pack} into {store.name} first"}
    else:
        manifest = open_data(config)[0].manifest
        pin_data(config, manifest)
        group_rows, classes = manifest.group_rows, len(manifest.classes)
        data = {
            "data": f"{manifest.rows:,} images of {_pixels(manifest)}, {classes} classes",
            "data fingerprint": manifest.fingerprint,
            "data in memory": _memory(config, manifest, hosted),
        }
    order = order_of(config, group_rows)
    parameters = parameter_count(config.model, classes)
    saved = 4 * parameters * (1 + _MOMENTS[config.optimizer.name])
    wire = parameters * (8 if config.reduction.mode == "exact" else 4)
    return {
        **numbers,
        **data,
        "steps": f"{config.epochs * order.steps:,} = {config.epochs} epochs x {order.steps}",
        "left out of an epoch": f"{order.remainder} images, others each time",
        "parameters": f"{parameters:,}",
        "checkpoint": f"{size(saved)}, {config.checkpoint.keep} kept beside the best",
        "reduced in a step": f"{size(wire)} a rank ({config.reduction.mode})",
    }


def _pixels(manifest: Manifest) -> str:
    return f"{manifest.size[1]} x {manifest.size[0]}" if manifest.size else "various sizes"


def _memory(config: Config, manifest: Manifest, hosted: int) -> str:
    wanted = streams_bytes(config, manifest, hosted)
    limit = int(config.data.memory)
    if wanted <= limit:
        return f"{size(wanted)} a rank, of {size(limit)} allowed"
    return (
        f"{size(limit)} a rank: its streams want {size(wanted)}, so rows are read again "
        "(raise data.memory, or lower data.shuffle_rows)"
    )


def size(count: float) -> str:
    """A number of bytes for a person: 1,000 bytes are 1 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
