"""Local mode: one process, a GPU where there is one, no Ray."""

from dataclasses import replace

import torch

from distrain.config import Config
from distrain.distributed.process import count_available_cores
from distrain.distributed.world import make_local_world
from distrain.errors import UserError
from distrain.launch.allocation import (
    Allocation,
    ClusterNode,
    choose_num_workers,
    compute_allocation,
    describe_idle_gpus,
)
from distrain.launch.signals import stop_on_signals
from distrain.monitor.sinks import Console
from distrain.train import Summary, train


def get_local_node() -> ClusterNode:
    """The cores and GPUs that this process may use, as one node; CUDA_VISIBLE_DEVICES counts."""
    has = {
        "CPU": float(count_available_cores()),
        "GPU": float(torch.cuda.device_count()),
    }
    return ClusterNode("this machine", "127.0.0.1", has, has, draining=False)


def compute_local_allocation(config: Config) -> tuple[Allocation, list[ClusterNode]]:
    """Count the workers that a run may have on this machine, and return the machine as the only node.

    Raises:
        UserError: there are fewer GPUs than workers, and none will come.
    """
    machine = get_local_node()
    share = compute_allocation(config, [machine])
    gpus = int(machine.total_resources["GPU"])
    if share.gpus_per_worker and share.min_workers > max(1, gpus):
        raise UserError(
            f"{share.min_workers} workers ask for a GPU each, and this machine shows {gpus}: use --workers auto, or train on "
            "CPUs with device=cpu"
        )
    return share, [machine]


def count_local_ranks(config: Config) -> int:
    """Return the number of ranks of a run on this machine."""
    return choose_num_workers(*compute_local_allocation(config))


def train_locally(
    config: Config,
    console: Console,
    *,
    must_resume: bool = False,
    accept_other_hardware: bool = False,
) -> tuple[Summary, int | None]:
    """Train in this process; the summary, and the signal that stopped it early if one did."""
    share, nodes = compute_local_allocation(config)
    world = make_local_world(config.device if share.gpus_per_worker else "cpu")
    world = replace(world, num_cores=share.cpus_per_worker)
    if world.device.type == "cuda":
        console.log(f"training on one GPU, {torch.cuda.get_device_name(world.device)}")
    if sentence := describe_idle_gpus(config, share, 1, nodes):
        console.log(sentence)
    with stop_on_signals(world.stop_requested.set) as received:
        summary = train(
            config,
            world,
            console,
            must_resume=must_resume,
            accept_other_hardware=accept_other_hardware,
        )
    return summary, received[0] if received and summary.status == "stopped" else None
