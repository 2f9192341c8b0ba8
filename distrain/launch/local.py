"""Local mode: one process, a GPU where there is one, no Ray."""

import torch

from distrain.config import Config
from distrain.launch.share import Node, fitting, remark, share_of
from distrain.launch.signals import stop_on_signals
from distrain.monitor.sinks import Console
from distrain.train import Summary, train
from distrain.world import available_cores, local_world


def this_machine() -> Node:
    """The cores and GPUs that this process may use, as one node; CUDA_VISIBLE_DEVICES counts."""
    has = {"CPU": float(available_cores()), "GPU": float(torch.cuda.device_count())}
    return Node("this machine", "127.0.0.1", has, has, draining=False)


def ranks_here(config: Config) -> int:
    """How many ranks the run has on this machine."""
    machine = this_machine()
    return fitting(share_of(config, [machine]), [machine])


def run(
    config: Config, console: Console, *, must_resume: bool = False, other_hardware: bool = False
) -> tuple[Summary, int | None]:
    """Train in this process; the summary, and the signal that stopped it early if one did."""
    world = local_world(config)
    if world.device.type == "cuda":
        console.event(f"training on one GPU, {torch.cuda.get_device_name(world.device)}")
    machine = this_machine()
    if sentence := remark(config, share_of(config, [machine]), 1, [machine]):
        console.event(sentence)
    with stop_on_signals(world.stop.set) as received:
        summary = train(config, world, console, must_resume=must_resume, other_hardware=other_hardware)
    return summary, received[0] if received and summary.status == "stopped" else None
