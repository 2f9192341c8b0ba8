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

from distrain.config import parse_config
from distrain.data.storage.store import Store
from distrain.distributed.world import World, open_process_group
from distrain.errors import AttemptError, RunError, UserError
from distrain.launch.allocation import Allocation
from distrain.monitor.health import Watchdog, group_timeout
from distrain.monitor.records import MetricsRecord, record_to_dict
from distrain.train import train

_ADVANCE_INTERVAL_SECONDS = 0.5
# Seconds that ranks have to meet at least: on a busy host one may start much later than the others.
_MIN_FORMING_SECONDS = 120.0
_preemption_notice = threading.Event()


def install_preemption_handler() -> None:
    """Take SIGTERM for the notice that this host will be taken away. Called in a worker's main thread."""
    signal.signal(signal.SIGTERM, lambda *_: _preemption_notice.set())


class RemoteConsole:
    """The lead's console: what it is told goes to the driver, which shows it."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox, self._last_advance_time = mailbox, 0.0

    def log(self, text: str) -> None:
        """A line on the driver's console."""
        self._mailbox.send_message.remote("event", text)

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Training starts."""
        self._mailbox.send_message.remote(
            "start", {"step": step, "steps": steps, "steps_per_epoch": steps_per_epoch}
        )

    def set_step(self, step: int) -> None:
        """So many steps are done; a message per step would be too many."""
        now = time.monotonic()
        if now - self._last_advance_time > _ADVANCE_INTERVAL_SECONDS:
            self._last_advance_time = now
            self._mailbox.send_message.remote("advance", step)

    def log_metrics(self, record: MetricsRecord) -> None:
        """A metrics record, as a tree: the mailbox's process need not know what it is."""
        self._mailbox.send_message.remote("record", record_to_dict(record))

    def stop(self) -> None:
        """Training is over."""
        self._mailbox.send_message.remote("stop", None)


def run_rank(rank_options: dict[str, Any]) -> dict[str, Any]:
    """One rank of one fit: train, and return the summary, or the error that no new attempt would mend.

    Raises:
        AttemptError: another attempt may go on. Ray replaces all ranks then.
    """
    tree = rank_options["config"]
    stall, run = float(tree["cluster"]["stall"]), str(tree["run"])
    share: Allocation = rank_options["share"]
    mailbox, context = rank_options["mailbox"], ray.train.get_context()
    console = RemoteConsole(mailbox)
    joining = open_process_group(
        _select_device(share),
        context.get_world_rank(),
        context.get_world_size(),
        broadcast_from_rank_zero,
        node_address=ray.util.get_node_ip_address(),
        timeout=group_timeout(stall),
        num_cores=share.cpus_per_worker,
        session=rank_options["session"],
        on_checkpoint=_make_checkpoint_reporter(Store(run).redacted_url),
        desired_world_size=share.max_workers,
    )
    try:
        with ExitStack() as stack:
            limit = max(stall, _MIN_FORMING_SECONDS)
            with Watchdog(
                limit, _make_hang_logger(console, context.get_world_rank())
            ) as forming:  # NCCL waits without an end
                forming.mark_progress("the forming of the worker group", waiting=True)
                world = stack.enter_context(joining)
            context = ray.get_runtime_context()
            places = world.all_gather_object(
                [context.get_node_id(), ray.util.get_node_ip_address()]
            )
            if world.is_rank_zero:
                mailbox.send_message.remote(
                    "formed", (places, ray.util.get_current_placement_group())
                )
                _stop_when(
                    world,
                    lambda: ray.get(mailbox.wait_for_stop.remote(rank_options["fit"])),
                )
            _stop_when(world, lambda: _preemption_notice.wait(60.0))
            with (
                world.raise_on_all_ranks()
            ):  # a loss of the user's own may be missing on this host alone
                config = parse_config(tree, "the config")
            summary = train(
                config,
                world,
                console,
                must_resume=rank_options["must_resume"],
                accept_other_hardware=rank_options["accept_other_hardware"],
            )
            return summary.to_dict()
    except AttemptError:
        raise
    except (UserError, RunError) as error:  # all ranks agree on it
        return {"status": type(error).__name__, "text": str(error)}


def _make_hang_logger(console: RemoteConsole, rank: int) -> Callable[[str, str], None]:
    """Return the report of a watchdog for a rank that hangs before its process group has formed."""

    def log_hang(sentence: str, stacks: str) -> None:
        console.log(f"rank {rank} hangs: {sentence}; its stacks:\n{stacks}")

    return log_hang


def _select_device(allocation: Allocation) -> torch.device:
    """What this rank computes on.

    Raises:
        AttemptError: it was given a GPU that torch does not find. Not to be agreed on by all ranks: these cannot meet.
    """
    if not allocation.gpus_per_worker:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise AttemptError(
            f"Ray gave a rank on {socket.gethostname()} a GPU, and torch finds none there: see what nvidia-smi and "
            "torch.cuda.is_available() say on it, or set device=cpu"
        )
    found: torch.device = ray.train.torch.get_device()
    return found


def _stop_when(world: World, wait_for_stop: Callable[[], bool]) -> None:
    """Set the world's stop when `wait`, which is called again and again, returns true."""

    def wait_and_stop() -> None:
        while not wait_for_stop():
            continue
        world.stop_requested.set()

    threading.Thread(target=wait_and_stop, name="distrain-stop", daemon=True).start()


def _make_checkpoint_reporter(run: str) -> Callable[[int, str | None], None]:
    """Tells Ray which checkpoint is whole, by name: the files are ours.

    A checkpoint of Ray's that names it would be one more file, and a rank dies when Ray cannot write it.
    """

    def report_checkpoint(step: int, name: str | None) -> None:
        ray.train.report(
            {"step": step}
            if name is None
            else {"step": step, "checkpoint": name, "run": run}
        )

    return report_checkpoint
