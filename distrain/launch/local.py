"""Local mode: one process, a GPU where there is one, no Ray."""

from dataclasses import replace

import torch

from distrain.config import Config
from distrain.distributed.process import available_cores
from distrain.distributed.world import local_world
from distrain.errors import UserError
from distrain.launch.share import Node, Share, fitting, remark, share_of
from distrain.launch.signals import stop_on_signals
from distrain.monitor.sinks import Console
from distrain.train import Summary, train


def this_machine() -> Node:
    """The cores and GPUs that this process may use, as one node; CUDA_VISIBLE_DEVICES counts."""
    has = {"CPU": float(available_cores()), "GPU": float(torch.cuda.device_count())}
    return Node("this machine", "127.0.0.1", has, has, draining=False)


def share_here(config: Config) -> tuple[Share, list[Node]]:
    """Count the workers that a run may have on this machine, and return the machine as the only node.

    Raises:
        UserError: there are fewer GPUs than workers, and none will come.
    """
    machine = this_machine()
    share = share_of(config, [machine])
    gpus = int(machine.total["GPU"])
    if share.gpus and share.least > max(1, gpus):
        raise UserError(
            f"{share.least} workers ask for a GPU each, and this machine shows {gpus}: use --workers auto, or train on "
            "CPUs with device=cpu"
        )
    return share, [machine]


def ranks_here(config: Config) -> int:
    """Return the number of ranks of a run on this machine."""
    return fitting(*share_here(config))


def run(
    config: Config,
    console: Console,
    *,
    must_resume: bool = False,
    other_hardware: bool = False,
) -> tuple[Summary, int | None]:
    """Train in this process; the summary, and the signal that stopped it early if one did."""
    share, nodes = share_here(config)
    world = local_world(config.device if share.gpus else "cpu")
    world = replace(world, cores=share.cpus)
    if world.device.type == "cuda":
        console.event(
            f"training on one GPU, {torch.cuda.get_device_name(world.device)}"
        )
    if sentence := remark(config, share, 1, nodes):
        console.event(sentence)
    with stop_on_signals(world.stop.set) as received:
        summary = train(
            config,
            world,
            console,
            must_resume=must_resume,
            other_hardware=other_hardware,
        )
    return summary, received[0] if received and summary.status == "stopped" else None
