"""What a config comes to, without training: every derived number, for `--dry-run`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distrain.config import Config
from distrain.data.prepare.builtin import BUILT_IN
from distrain.data.shards.manifest import MANIFEST, Manifest
from distrain.data.storage.store import Store
from distrain.errors import UserError
from distrain.training.datasets import open_sets, order_of, pin_data, streams_bytes
from distrain.training.setup import check_model


def rates(
    config: Config, rows: int, images: int | None = None
) -> list[tuple[int, float, float]]:
    """The learning rate at `rows` steps spread evenly over the run, the last one among them: (step, epoch, rate).

    `images`: how many there are to train on; None: as many as the data set has. Of a plateau schedule nothing but its
    warm-up is known ahead.
    """
    if images is not None and images < config.global_batch:
        raise UserError(
            f"{images} images make no global batch of {config.global_batch}: say more of them"
        )
    per_epoch = (
        order_of(config, _group_rows(config)).steps
        if images is None
        else images // config.global_batch
    )
    steps = config.epochs * per_epoch
    picked = sorted({round(i * (steps - 1) / max(1, rows - 1)) for i in range(rows)})
    return [
        (step, step / per_epoch, config.schedule.rate(step, per_epoch, steps))
        for step in picked
    ]


def draw_rates(
    config: Config, curve: Sequence[tuple[int, float, float]], target: Path
) -> None:
    """Draw what `rates` gave into an image file; rates that drop by factors on a logarithmic axis.

    Raises:
        UserError: matplotlib is not installed, or does not know the kind of file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "drawing needs matplotlib: pip install 'distrain[report]'"
        ) from None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([epoch for _, epoch, _ in curve], [rate for _, _, rate in curve])
    axes.set(
        xlabel="epoch",
        ylabel="learning rate",
        title=f"{config.run}: {config.schedule.name}",
    )
    axes.set_yscale("log" if config.schedule.by_factors else "linear")
    axes.grid(visible=True, alpha=0.3)
    try:
        figure.savefig(target)
    except ValueError as error:
        raise UserError(f"cannot draw into {target}: {error}") from None


def _group_rows(config: Config) -> NDArray[np.int64]:
    if config.data.pack and not Store(config.data.train).exists(MANIFEST):
        return BUILT_IN[config.data.pack].group_rows
    return open_sets(config)[0].manifest.group_rows


def plan(config: Config, ranks: int) -> dict[str, str]:
    """Name and value of each derived number, as text; what only the data tells is said to be unknown without it.

    Raises:
        UserError: the data or an imported network does not fit the config.
    """
    hosted = -(-config.virtual_workers // ranks)
    numbers = {
        "run directory": str(config.run),
        "global batch": f"{config.global_batch} = {config.virtual_workers} virtual workers x {config.micro_batch}",
        "virtual workers a rank": f"{hosted} on {ranks} rank{'s' * (ranks > 1)}",
    }
    store = Store(config.data.train)
    if config.data.pack and not store.exists(MANIFEST):
        group_rows, classes = (
            BUILT_IN[config.data.pack].group_rows,
            BUILT_IN[config.data.pack].classes,
        )
        data = {
            "data": f"not packed yet: training packs the {config.data.pack} into {store.name} first"
        }
    else:
        manifest = open_sets(config)[0].manifest
        pin_data(config, manifest)
        group_rows, classes = manifest.group_rows, len(manifest.classes)
        data = {
            "data": f"{manifest.rows:,} images of {_pixels(manifest)}, {classes} classes",
            "data fingerprint": manifest.fingerprint,
            "data in memory": _memory(config, manifest, hosted),
        }
    order = order_of(config, group_rows)
    model = config.model.outline(classes)
    check_model(config, model, classes)
    parameters = sum(p.numel() for p in model.parameters())
    saved = 4 * parameters * (1 + len(config.optimizer.moments()))
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
    return (
        f"{manifest.size[1]} x {manifest.size[0]}" if manifest.size else "various sizes"
    )


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
