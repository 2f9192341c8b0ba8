"""Local mode: one process, a GPU where there is one, no Ray."""

from distrain.config import Config
from distrain.launch.signals import stop_on_signals
from distrain.monitor.sinks import Console
from distrain.train import Summary, train
from distrain.world import local_world


def run(
    config: Config, console: Console, *, must_resume: bool = False, other_hardware: bool = False
) -> tuple[Summary, int | None]:
    """Train in this process; the summary, and the signal that stopped it early if one did."""
    world = local_world(config)
    with stop_on_signals(world.stop.set) as received:
        summary = train(config, world, console, must_resume=must_resume, other_hardware=other_hardware)
    return summary, received[0] if received and summary.status == "stopped" else None
