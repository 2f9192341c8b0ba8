"""Everything that a config determines before training: for `--dry-run` and `lr`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray

from distrain.config import Config, to_yaml
from distrain.data.prepare.builtin import BUILT_IN_DATASETS
from distrain.data.shards.manifest import MANIFEST_FILE, Manifest
from distrain.data.storage.store import Store
from distrain.errors import UserError
from distrain.launch.allocation import (
    Allocation,
    ClusterNode,
    choose_num_workers,
    compute_allocation,
    describe_allocation,
)
from distrain.training.run_data import (
    build_order,
    estimate_shuffle_bytes,
    open_datasets,
    pin_data_fingerprint,
)
from distrain.training.setup import check_model

_FP32_BYTES = 4
_INT64_BYTES = 8
# Names of the printed numbers, with their colon, are padded to this width.
_NAME_WIDTH = 26


class _DataFacts(NamedTuple):
    """Training data of a run, packed or not."""

    descriptions: dict[str, str]
    """Text to print, by name."""
    group_rows: NDArray[np.int64]
    """Rows per row group, shape (groups,)."""
    num_classes: int


def print_dry_run(config: Config, address: str | None) -> None:
    """Print a config as YAML, and the numbers derived from it.

    Args:
        config: the run.
        address: Ray cluster to train on; None: this machine.

    Raises:
        UserError: the cluster, the data or the model does not fit the config.
    """
    # The allocation first: nothing is printed if the cluster does not answer.
    allocation, nodes = _compute_allocation_at(config, address)
    workers = describe_allocation(
        config, allocation, nodes, is_elastic=address is not None
    )
    typer.echo(to_yaml(config))
    run = describe_run(config, choose_num_workers(allocation, nodes))
    for name, value in {**run, **workers}.items():
        typer.echo(f"{name + ':':<{_NAME_WIDTH}} {value}")


def _compute_allocation_at(
    config: Config, address: str | None
) -> tuple[Allocation, list[ClusterNode]]:
    """Return the workers of a run on a cluster or this machine, and the nodes."""
    if address is None:
        from distrain.launch.local import compute_local_allocation

        return compute_local_allocation(config)
    from distrain.launch.ray_cluster import fetch_cluster_nodes
    from distrain.monitor.sinks import SilentConsole

    nodes = fetch_cluster_nodes(address, SilentConsole())
    return compute_allocation(config, nodes), nodes


def describe_run(config: Config, world_size: int) -> dict[str, str]:
    """Return the numbers derived from a config as text, by name.

    Memory and fingerprint are left out while a built-in data set is not packed yet.

    Raises:
        UserError: the data or an imported model does not fit the config.
    """
    # Data: from the manifest, or known in advance for a built-in data set.
    virtual_workers_per_rank = -(-config.virtual_workers // world_size)
    data = _describe_data(config, virtual_workers_per_rank)
    order = build_order(config, data.group_rows)

    # Model: without memory for weights (meta device), except an imported one, which
    # is built and tried out.
    model = config.model.build_skeleton(data.num_classes)
    check_model(config, model, data.num_classes)
    num_parameters = sum(p.numel() for p in model.parameters())

    # Weights and optimizer state are saved in fp32; exact sums are 64-bit integers.
    tensors_per_parameter = 1 + len(config.optimizer.list_state_tensors())
    checkpoint_bytes = _FP32_BYTES * num_parameters * tensors_per_parameter
    is_exact = config.reduction.mode == "exact"
    reduced_bytes = num_parameters * (_INT64_BYTES if is_exact else _FP32_BYTES)
    num_steps = config.epochs * order.steps_per_epoch
    return {
        "run directory": str(config.run),
        "global batch": f"{config.global_batch} = {config.virtual_workers} virtual "
        f"workers x {config.micro_batch_size}",
        "virtual workers per rank": f"{virtual_workers_per_rank} ({world_size} "
        f"rank{'s' * (world_size > 1)})",
        **data.descriptions,
        "steps": f"{num_steps:,} = {config.epochs} x {order.steps_per_epoch} per epoch",
        "left out per epoch": f"{order.num_left_out} images, different ones each time",
        "parameters": f"{num_parameters:,}",
        "checkpoint": f"{format_bytes(checkpoint_bytes)}, the newest "
        f"{config.checkpoint.keep} and the best are kept",
        "all-reduce per step": f"{format_bytes(reduced_bytes)} per rank "
        f"({config.reduction.mode})",
    }


def _describe_data(config: Config, virtual_workers_per_rank: int) -> _DataFacts:
    """Return the facts on the training data, of which the manifest is read at most."""
    store = Store(config.data.train)
    if config.data.pack and not store.exists(MANIFEST_FILE):
        built_in = BUILT_IN_DATASETS[config.data.pack]
        text = (
            f"not packed yet: training first packs the {config.data.pack} into "
            f"{store.redacted_url}"
        )
        return _DataFacts({"data": text}, built_in.group_rows, built_in.num_classes)
    manifest = open_datasets(config)[0].manifest
    pin_data_fingerprint(config, manifest)
    num_classes = len(manifest.classes)
    descriptions = {
        "data": f"{manifest.num_rows:,} images of {_format_image_size(manifest)}, "
        f"{num_classes} classes",
        "data fingerprint": manifest.fingerprint,
        "data in memory": _describe_memory(config, manifest, virtual_workers_per_rank),
    }
    return _DataFacts(descriptions, manifest.rows_per_group, num_classes)


def _format_image_size(manifest: Manifest) -> str:
    if manifest.image_size is None:
        return "various sizes"
    height, width = manifest.image_size
    return f"{width} x {height}"


def _describe_memory(
    config: Config, manifest: Manifest, virtual_workers_per_rank: int
) -> str:
    needed = estimate_shuffle_bytes(config, manifest, virtual_workers_per_rank)
    limit = int(config.data.memory)
    if needed <= limit:
        return f"{format_bytes(needed)} per rank, of {format_bytes(limit)} allowed"
    return (
        f"{format_bytes(limit)} per rank, but shuffling needs {format_bytes(needed)}: "
        "rows are read repeatedly (raise data.memory, or for a new run lower "
        "data.shuffle_rows)"
    )


def format_bytes(num_bytes: float) -> str:
    """Return a number of bytes with a decimal unit: 1,000 bytes are 1.0 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            # Bytes are whole; larger units get one digit after the point.
            digits = 0 if unit == "B" else 1
            return f"{num_bytes:.{digits}f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def compute_lr_curve(
    config: Config, num_points: int, images: int | None = None
) -> list[tuple[int, float, float]]:
    """Return (step, epoch, learning rate) at steps spread evenly over the run.

    The first and the last step are among them. Of a plateau schedule only the warm-up
    is known in advance.

    Args:
        config: the run.
        num_points: steps to return; fewer if the run is shorter.
        images: number of training images; None: those of the data set.

    Raises:
        UserError: `images` is less than one global batch, or the data does not fit.
    """
    if images is not None and images < config.global_batch:
        raise UserError(
            f"--images {images} is less than one global batch ({config.global_batch}): "
            "pass more"
        )
    # Given the number of images, the data set need not exist.
    if images is None:
        order = build_order(config, _load_group_rows(config))
        steps_per_epoch = order.steps_per_epoch
    else:
        steps_per_epoch = images // config.global_batch
    num_steps = config.epochs * steps_per_epoch

    # Evenly spaced; a set, because in a short run several points fall on one step.
    last_step = num_steps - 1
    last_point = max(1, num_points - 1)
    steps = {round(i * last_step / last_point) for i in range(num_points)}
    curve = []
    for step in sorted(steps):
        lr = config.schedule.get_lr(step, steps_per_epoch, num_steps)
        curve.append((step, step / steps_per_epoch, lr))
    return curve


def _load_group_rows(config: Config) -> NDArray[np.int64]:
    """Return the rows per row group of the training set, shape (groups,)."""
    if config.data.pack and not Store(config.data.train).exists(MANIFEST_FILE):
        return BUILT_IN_DATASETS[config.data.pack].group_rows
    return open_datasets(config)[0].manifest.rows_per_group


def plot_lr_curve(
    config: Config, curve: Sequence[tuple[int, float, float]], target: Path
) -> None:
    """Plot what `compute_lr_curve` returned into an image file.

    The axis is logarithmic for schedules that multiply the rate by factors.

    Raises:
        UserError: matplotlib is not installed, or cannot write this type of file.
    """
    try:
        # Not pyplot, which would choose a backend that may need a display.
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "the plot needs matplotlib: pip install 'distrain[report]'"
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
    # matplotlib reports a suffix that it does not know as a ValueError.
    try:
        figure.savefig(target)
    except ValueError as error:
        raise UserError(f"cannot plot into {target}: {error}") from None
