"""A rank on a Ray cluster: the training function with its process group, and its console."""

import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero

from distrain.config import parse
from distrain.data.storage.store import Store
from distrain.distributed.world import World, joined
from distrain.errors import AttemptError, RunError, UserError
from distrain.launch.share import Share
from distrain.monitor.health import Watchdog, group_timeout
from distrain.monitor.records import MetricsRecord, to_tree
from distrain.train import train

_ADVANCE_EVERY = 0.5
# Seconds that ranks have to meet at least: on a busy host one may start much later than the others.
_FORMING = 120.0
_notified = threading.Event()


def heed_sigterm() -> None:
    """Take SIGTERM for the notice that this host will be taken away. Called in a worker's main thread."""
    signal.signal(signal.SIGTERM, lambda *_: _notified.set())


class RemoteConsole:
    """The lead's console: what it is told goes to the driver, which shows it."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox, self._advanced = mailbox, 0.0

    def event(self, text: str) -> None:
        """A line on the driver's console."""
        self._mailbox.put.remote("event", text)

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Training starts."""
        self._mailbox.put.remote(
            "start", {"step": step, "steps": steps, "steps_per_epoch": steps_per_epoch}
        )

    def advance(self, step: int) -> None:
        """So many steps are done; a message per step would be too many."""
        now = time.monotonic()
        if now - self._advanced > _ADVANCE_EVERY:
            self._advanced = now
            self._mailbox.put.remote("advance", step)

    def record(self, record: MetricsRecord) -> None:
        """A metrics record, as a tree: the mailbox's process need not know what it is."""
        self._mailbox.put.remote("record", to_tree(record))

    def stop(self) -> None:
        """Training is over."""
        self._mailbox.put.remote("stop", None)


def run_rank(order: dict[str, Any]) -> dict[str, Any]:
    """One rank of one fit: train, and return the summary, or the error that no new attempt would mend.

    Raises:
        AttemptError: another attempt may go on. Ray replaces all ranks then.
    """
    tree = order["config"]
    stall, run = float(tree["cluster"]["stall"]), str(tree["run"])
    share: Share = order["share"]
    mailbox, context = order["mailbox"], ray.train.get_context()
    console = RemoteConsole(mailbox)
    joining = joined(
        _device(share),
        context.get_world_rank(),
        context.get_world_size(),
        broadcast_from_rank_zero,
        address=ray.util.get_node_ip_address(),
        timeout=group_timeout(stall),
        cores=share.cpus,
        session=order["session"],
        saved=_pointer(Store(run).name),
        wanted=share.most,
    )
    try:
        with ExitStack() as stack:
            limit = max(stall, _FORMING)
            with Watchdog(
                limit, _forming(console, context.get_world_rank())
            ) as forming:  # NCCL waits without an end
                forming.at("the forming of the worker group", waiting=True)
                world = stack.enter_context(joining)
            context = ray.get_runtime_context()
            places = world.gather(
                [context.get_node_id(), ray.util.get_node_ip_address()]
            )
            if world.lead:
                mailbox.put.remote(
                    "formed", (places, ray.util.get_current_placement_group())
                )
                _set_when(world, lambda: ray.get(mailbox.stopped.remote(order["fit"])))
            _set_when(world, lambda: _notified.wait(60.0))
            with (
                world.together()
            ):  # a loss of the user's own may be missing on this host alone
                config = parse(tree, "the config")
            summary = train(
                config,
                world,
                console,
                must_resume=order["must_resume"],
                other_hardware=order["other_hardware"],
            )
            return summary.to_tree()
    except AttemptError:
        raise
    except (UserError, RunError) as error:  # all ranks agree on it
        return {"status": type(error).__name__, "text": str(error)}


def _forming(console: RemoteConsole, rank: int) -> Callable[[str, str], None]:
    """Return the report of a watchdog for a rank that hangs before its process group has formed."""

    def report(sentence: str, stacks: str) -> None:
        console.event(f"rank {rank} hangs: {sentence}; its stacks:\n{stacks}")

    return report


def _device(share: Share) -> torch.device:
    """What this rank computes on.

    Raises:
        AttemptError: it was given a GPU that torch does not find. Not to be agreed on by all ranks: these cannot meet.
    """
    if not share.gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise AttemptError(
            f"Ray gave a rank on {socket.gethostname()} a GPU, and torch finds none there: see what nvidia-smi and "
            "torch.cuda.is_available() say on it, or set device=cpu"
        )
    found: torch.device = ray.train.torch.get_device()
    return found


def _set_when(world: World, wait: Callable[[], bool]) -> None:
    """Set the world's stop when `wait`, which is called again and again, returns true."""

    def listen() -> None:
        while not wait():
            continue
        world.stop.set()

    threading.Thread(target=listen, name="distrain-stop", daemon=True).start()


def _pointer(run: str) -> Callable[[int, str | None], None]:
    """Tells Ray which checkpoint is whole, by name: the files are ours.

    A checkpoint of Ray's that names it would be one more file, and a rank dies when Ray cannot write it.
    """

    def saved(step: int, name: str | None) -> None:
        ray.train.report(
            {"step": step}
            if name is None
            else {"step": step, "checkpoint": name, "run": run}
        )

    return saved
