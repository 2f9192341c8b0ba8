"""Local mode: one process, a GPU where there is one, no Ray."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from distrain.config import Config
from distrain.monitor.sinks import Console
from distrain.train import Summary, train
from distrain.world import World, local_world


def run(config: Config, console: Console, *, must_resume: bool = False) -> tuple[Summary, int | None]:
    """Train in this process; the summary, and the signal that stopped it early if one did."""
    world = local_world(config)
    with _stop_on_signals(world) as received:
        summary = train(config, world, console, must_resume=must_resume)
    return summary, received[0] if received and summary.status == "stopped" else None


@contextmanager
def _stop_on_signals(world: World) -> Iterator[list[int]]:
    """Let Ctrl-C and SIGTERM end the run at the next step, with a checkpoint; a second one ends it at once."""
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        for s, handler in before.items():
            signal.signal(s, handler)
        received.append(number)
        world.stop.set()  # and nothing else: this may run inside any call, a print included

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    for s in before:
        signal.signal(s, stop)
    try:
        yield received
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
