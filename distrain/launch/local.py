"""Local mode: train in one process, on a GPU if there is one, without Ray."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch

from distrain.config import Config
from distrain.distributed.process import count_available_cores
from distrain.distributed.world import make_local_world
from distrain.errors import RunError, UserError
from distrain.launch.allocation import (
    Allocation,
    ClusterNode,
    choose_num_workers,
    compute_allocation,
    describe_idle_gpus,
)
from distrain.launch.signals import STOPPING_LINE, stop_on_signals
from distrain.monitor.sinks import Console
from distrain.trainer import Summary, train


def get_local_node() -> ClusterNode:
    """Return the cores and GPUs that this process may use, as one node.

    CUDA_VISIBLE_DEVICES and the CPU affinity of the process count.
    """
    resources = {
        "CPU": float(count_available_cores()),
        "GPU": float(torch.cuda.device_count()),
    }
    return ClusterNode(
        id="this machine",
        address="127.0.0.1",
        total_resources=resources,
        available_resources=resources,
        draining=False,
    )


def compute_local_allocation(config: Config) -> tuple[Allocation, list[ClusterNode]]:
    """Compute a run's allocation on this machine; return it and the only node.

    Raises:
        UserError: the machine has fewer GPUs than workers, or fewer cores than a
            worker is to have.
    """
    node = get_local_node()
    allocation = compute_allocation(config, [node])
    num_gpus = int(node.total_resources["GPU"])
    if allocation.gpus_per_worker and not num_gpus and allocation.min_workers == 1:
        setting = "device is cuda"
        remedy = "device=auto or device=cpu"
        if config.device != "cuda":
            setting = "cluster.gpus_per_worker is 1"
            remedy = "cluster.gpus_per_worker=auto"
        raise UserError(f"{setting}, but this machine has no GPU: use {remedy}")
    num_cores = int(node.total_resources["CPU"])
    if allocation.cpus_per_worker > num_cores:
        raise UserError(
            f"cluster.cpus_per_worker is {allocation.cpus_per_worker}, but this "
            f"machine has {num_cores} CPU core{'s' * (num_cores != 1)}: use auto, or "
            f"at most {num_cores}"
        )
    if allocation.gpus_per_worker and allocation.min_workers > num_gpus:
        raise UserError(
            f"{allocation.min_workers} workers need a GPU each, but this machine shows "
            f"{num_gpus}: use --workers auto, or train on CPUs with device=cpu"
        )
    return allocation, [node]


def count_local_ranks(config: Config) -> int:
    """Return the number of ranks of a run on this machine."""
    allocation, nodes = compute_local_allocation(config)
    return choose_num_workers(allocation, nodes)


def train_locally(
    config: Config,
    console: Console,
    *,
    must_resume: bool = False,
    accept_other_hardware: bool = False,
) -> tuple[Summary, int | None]:
    """Train in this process.

    Args:
        config: the run.
        console: where progress is printed.
        must_resume: fail if there is no checkpoint.
        accept_other_hardware: resume even if this hardware does not reproduce the
            checkpoint's bits.

    Returns:
        The summary, and the number of the signal that stopped the run early, or None.
    """
    # Build a world of one rank.
    allocation, nodes = compute_local_allocation(config)
    world = make_local_world(config.device if allocation.gpus_per_worker else "cpu")
    world = replace(world, num_cores=allocation.cpus_per_worker)
    if world.device.type == "cuda":
        console.log(f"training on one GPU, {torch.cuda.get_device_name(world.device)}")
    idle = describe_idle_gpus(config, allocation, num_workers=1, nodes=nodes)
    if idle is not None:
        console.log(idle)

    # Train until the end, or until a signal asks to stop.
    with (
        stop_on_signals(world.stop_requested.set) as received,
        _log_first_signal(world.stop_requested, received, console),
    ):
        summary = train(
            config,
            world,
            console,
            must_resume=must_resume,
            accept_other_hardware=accept_other_hardware,
        )
    # A signal during the last step did not stop anything.
    was_stopped = bool(received) and summary.status == "stopped"
    return summary, received[0] if was_stopped else None


@contextmanager
def _log_first_signal(
    stop_requested: threading.Event, received: Sequence[int], console: Console
) -> Iterator[None]:
    """Log the first signal when it comes, not after the step, which may take long.

    On a thread: a signal handler may interrupt any print, so it must not print itself.
    """

    def wait_and_log() -> None:
        stop_requested.wait()
        if received:
            # If nobody reads the output, the training thread raises this as well.
            with suppress(RunError):
                console.log(STOPPING_LINE)

    thread = threading.Thread(target=wait_and_log, name="distrain-stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        # The run is over: wake the thread.
        stop_requested.set()
        thread.join()
