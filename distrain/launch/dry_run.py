"""Everything that a config determines before training: `--dry-run`."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.config import Config, check_is_config
from distrain.data.prepare.builtin import BUILT_IN_DATASETS
from distrain.data.shards.manifest import MANIFEST_FILE, Manifest
from distrain.data.storage.store import Store
from distrain.data.storage.url import redact_url
from distrain.launch.allocation import (
    Allocation,
    ClusterNode,
    choose_num_workers,
    compute_allocation,
    describe_allocation,
)
from distrain.training.model_setup import prepare_model
from distrain.training.run_data import (
    build_order,
    estimate_shuffle_bytes,
    open_datasets,
    pin_data_fingerprint,
)

_FP32_BYTES = 4
_INT64_BYTES = 8


class _DataFacts(NamedTuple):
    """Training data of a run, packed or not."""

    descriptions: dict[str, str]
    """Text to print, by name."""
    group_rows: NDArray[np.int64]
    """Rows per row group, shape (groups,)."""
    num_classes: int


def dry_run(config: Config, address: str | None = None) -> dict[str, str]:
    """Return the numbers that a config determines before training, as text by name.

    Among them are the workers, steps, parameters, memory and the data's fingerprint.

    Args:
        config: the run.
        address: Ray cluster to train on. Default: this machine.

    Raises:
        UserError: the cluster, the data or the model does not fit the config.
    """
    check_is_config(config, "dry_run")
    # The allocation first: without an answer from the cluster the rest is in vain.
    allocation, nodes = _compute_allocation_at(config, address)
    workers = describe_allocation(
        config, allocation, nodes, is_elastic=address is not None
    )
    run = describe_run(config, choose_num_workers(allocation, nodes))
    return {**run, **workers}


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
    most_virtual_workers = -(-config.virtual_workers // world_size)
    data = _describe_data(config, most_virtual_workers)
    order = build_order(config, data.group_rows)

    # Model: without memory for weights (meta device), except an imported one, which
    # is built and tried out.
    model = config.model.build_skeleton(data.num_classes)
    prepare_model(config, model, data.num_classes)
    num_parameters = sum(p.numel() for p in model.parameters())
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = f"{num_parameters:,}"
    if num_trained < num_parameters:
        parameters += f", of which {num_trained:,} are trained"

    # Weights and optimizer state are saved in fp32; exact sums are 64-bit integers.
    num_state = num_trained * len(config.optimizer.list_state_tensors())
    checkpoint_bytes = _FP32_BYTES * (num_parameters + num_state)
    is_exact = config.reduction.mode == "exact"
    reduced_bytes = num_trained * (_INT64_BYTES if is_exact else _FP32_BYTES)
    # The file is read when the run starts.
    init = {}
    if config.model.init_from is not None:
        init = {"initial weights": redact_url(config.model.init_from)}
    num_steps = config.epochs * order.steps_per_epoch
    at_most = "at most " if config.virtual_workers % world_size else ""
    may_stop = "at most " if config.stop.patience is not None else ""
    return {
        "run directory": str(config.run),
        "global batch": f"{config.global_batch} = {config.virtual_workers} virtual "
        f"workers x {config.micro_batch_size}",
        "virtual workers": f"{config.virtual_workers}, {at_most}{most_virtual_workers} "
        "per worker",
        **data.descriptions,
        "steps": f"{may_stop}{num_steps:,} = {config.epochs} x {order.steps_per_epoch} "
        "per epoch",
        "left out per epoch": f"{order.num_left_out} images, different ones each time",
        "parameters": parameters,
        **init,
        "checkpoint": f"{format_bytes(checkpoint_bytes)}, the newest "
        f"{config.checkpoint.keep} and the best are kept",
        "all-reduce per step": f"{format_bytes(reduced_bytes)} per worker "
        f"({config.reduction.mode})",
    }


def _describe_data(config: Config, most_virtual_workers: int) -> _DataFacts:
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
        "data in memory": _describe_memory(config, manifest, most_virtual_workers),
    }
    return _DataFacts(descriptions, manifest.rows_per_group, num_classes)


def _format_image_size(manifest: Manifest) -> str:
    if manifest.image_size is None:
        return "various sizes"
    height, width = manifest.image_size
    return f"{width} x {height}"


def _describe_memory(
    config: Config, manifest: Manifest, most_virtual_workers: int
) -> str:
    needed = estimate_shuffle_bytes(config, manifest, most_virtual_workers)
    limit = int(config.data.memory)
    if needed <= limit:
        return f"{format_bytes(needed)} per worker, of {format_bytes(limit)} allowed"
    return (
        f"{format_bytes(limit)} per worker, but shuffling needs "
        f"{format_bytes(needed)}: rows are read repeatedly (raise data.memory, or "
        "for a new run lower data.shuffle_rows)"
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
