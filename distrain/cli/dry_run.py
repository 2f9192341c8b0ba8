"""What a config comes to, without training: every derived number, for `--dry-run`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distrain.config import Config
from distrain.data.prepare.builtin import BUILT_IN_DATASETS
from distrain.data.shards.manifest import MANIFEST_FILE, Manifest
from distrain.data.storage.store import Store
from distrain.errors import UserError
from distrain.training.run_data import (
    build_order,
    estimate_shuffle_bytes,
    open_datasets,
    pin_data_fingerprint,
)
from distrain.training.setup import check_model


def compute_lr_curve(
    config: Config, num_points: int, images: int | None = None
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
        build_order(config, _load_group_rows(config)).steps_per_epoch
        if images is None
        else images // config.global_batch
    )
    steps = config.epochs * per_epoch
    picked = sorted(
        {round(i * (steps - 1) / max(1, num_points - 1)) for i in range(num_points)}
    )
    return [
        (step, step / per_epoch, config.schedule.get_lr(step, per_epoch, steps))
        for step in picked
    ]


def plot_lr_curve(
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
    axes.set_yscale("log" if config.schedule.is_multiplicative else "linear")
    axes.grid(visible=True, alpha=0.3)
    try:
        figure.savefig(target)
    except ValueError as error:
        raise UserError(f"cannot draw into {target}: {error}") from None


def _load_group_rows(config: Config) -> NDArray[np.int64]:
    if config.data.pack and not Store(config.data.train).exists(MANIFEST_FILE):
        return BUILT_IN_DATASETS[config.data.pack].group_rows
    return open_datasets(config)[0].manifest.rows_per_group


def describe_run(config: Config, world_size: int) -> dict[str, str]:
    """Name and value of each derived number, as text; what only the data tells is said to be unknown without it.

    Raises:
        UserError: the data or an imported network does not fit the config.
    """
    hosted = -(-config.virtual_workers // world_size)
    numbers = {
        "run directory": str(config.run),
        "global batch": f"{config.global_batch} = {config.virtual_workers} virtual workers x {config.micro_batch_size}",
        "virtual workers a rank": f"{hosted} on {world_size} rank{'s' * (world_size > 1)}",
    }
    store = Store(config.data.train)
    if config.data.pack and not store.exists(MANIFEST_FILE):
        group_rows, classes = (
            BUILT_IN_DATASETS[config.data.pack].group_rows,
            BUILT_IN_DATASETS[config.data.pack].num_classes,
        )
        data = {
            "data": f"not packed yet: training packs the {config.data.pack} into {store.redacted_url} first"
        }
    else:
        manifest = open_datasets(config)[0].manifest
        pin_data_fingerprint(config, manifest)
        group_rows, classes = manifest.rows_per_group, len(manifest.classes)
        data = {
            "data": f"{manifest.num_rows:,} images of {_format_image_size(manifest)}, {classes} classes",
            "data fingerprint": manifest.fingerprint,
            "data in memory": _describe_memory(config, manifest, hosted),
        }
    order = build_order(config, group_rows)
    model = config.model.build_skeleton(classes)
    check_model(config, model, classes)
    parameters = sum(p.numel() for p in model.parameters())
    saved = 4 * parameters * (1 + len(config.optimizer.list_state_tensors()))
    wire = parameters * (8 if config.reduction.mode == "exact" else 4)
    return {
        **numbers,
        **data,
        "steps": f"{config.epochs * order.steps_per_epoch:,} = {config.epochs} epochs x {order.steps_per_epoch}",
        "left out of an epoch": f"{order.num_left_out} images, others each time",
        "parameters": f"{parameters:,}",
        "checkpoint": f"{format_bytes(saved)}, {config.checkpoint.keep} kept beside the best",
        "reduced in a step": f"{format_bytes(wire)} a rank ({config.reduction.mode})",
    }


def _format_image_size(manifest: Manifest) -> str:
    return (
        f"{manifest.image_size[1]} x {manifest.image_size[0]}"
        if manifest.image_size
        else "various sizes"
    )


def _describe_memory(
    config: Config, manifest: Manifest, virtual_workers_per_rank: int
) -> str:
    wanted = estimate_shuffle_bytes(config, manifest, virtual_workers_per_rank)
    limit = int(config.data.memory)
    if wanted <= limit:
        return f"{format_bytes(wanted)} a rank, of {format_bytes(limit)} allowed"
    return (
        f"{format_bytes(limit)} a rank: its streams want {format_bytes(wanted)}, so rows are read again "
        "(raise data.memory, or lower data.shuffle_rows)"
    )


def format_bytes(num_bytes: float) -> str:
    """A number of bytes for a person: 1,000 bytes are 1 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return (
                f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
            )
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
