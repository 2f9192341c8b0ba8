"""One rank on a Ray cluster: form the process group, train, report to the driver."""

import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
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
from distrain.trainer import train

_ADVANCE_INTERVAL_SECONDS = 0.5
# The least time that ranks get to form their process group, in seconds: on a busy host
# one may start much later than the others.
_MIN_FORMING_SECONDS = 120.0
# Set by SIGTERM: this host will be taken away.
_preemption_notice = threading.Event()


def install_preemption_handler() -> None:
    """Treat SIGTERM as a preemption notice. Call it in a worker's main thread."""
    signal.signal(signal.SIGTERM, lambda *_: _preemption_notice.set())


class RemoteConsole:
    """Console of rank 0 that sends all messages to the driver, which shows them."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._last_advance_time = 0.0

    def log(self, text: str) -> None:
        """Send a line."""
        self._mailbox.send_message.remote("event", text)

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Send that training starts, with `step` steps done."""
        self._mailbox.send_message.remote(
            "start", {"step": step, "steps": steps, "steps_per_epoch": steps_per_epoch}
        )

    def set_step(self, step: int) -> None:
        """Send the number of steps done, at most twice per second."""
        now = time.monotonic()
        if now - self._last_advance_time > _ADVANCE_INTERVAL_SECONDS:
            self._last_advance_time = now
            self._mailbox.send_message.remote("advance", step)

    def log_metrics(self, record: MetricsRecord) -> None:
        """Send a metrics record as plain values: the mailbox lacks its class."""
        self._mailbox.send_message.remote("record", record_to_dict(record))

    def stop(self) -> None:
        """Send that training is over."""
        self._mailbox.send_message.remote("stop", None)


def run_rank(train_loop_config: dict[str, Any]) -> dict[str, Any]:
    """Run one rank of one fit.

    Args:
        train_loop_config: config, allocation, mailbox, number of the fit, and id and
            options of the launch: see `ray_trainer.build_trainer`.

    Returns:
        The summary as plain values; or, as status and text, the UserError or RunError
        that ends the run because a new attempt would not help.

    Raises:
        AttemptError: another attempt may succeed. Ray then replaces all ranks.
    """
    mailbox = train_loop_config["mailbox"]
    console = RemoteConsole(mailbox)
    process_group = _open_process_group(train_loop_config)
    try:
        with ExitStack() as stack:
            # Form the process group. NCCL would wait forever for a rank that does not
            # come: the watchdog then ends this process.
            stall_seconds = float(train_loop_config["config"]["cluster"]["stall"])
            limit = max(stall_seconds, _MIN_FORMING_SECONDS)
            rank = ray.train.get_context().get_world_rank()
            with Watchdog(limit, _make_hang_logger(console, rank)) as watchdog:
                watchdog.mark_progress("forming the worker group", waiting=True)
                world = stack.enter_context(process_group)
            _report_group(world, mailbox)
            _listen_for_stop(world, mailbox, train_loop_config["fit"])

            # Only now, with all ranks together: a module of the user's own, which the
            # config names, may be missing on this host alone.
            with world.raise_on_all_ranks():
                config = parse_config(train_loop_config["config"], "the config")
            summary = train(
                config,
                world,
                console,
                must_resume=train_loop_config["must_resume"],
                accept_other_hardware=train_loop_config["accept_other_hardware"],
            )
            return summary.to_dict()
    except AttemptError:
        raise
    except (UserError, RunError) as error:
        # All ranks raise it together. Returned, it makes Ray start no new attempt.
        return {"status": type(error).__name__, "text": str(error)}


def _open_process_group(
    train_loop_config: dict[str, Any],
) -> AbstractContextManager[World]:
    """Return the process group of this rank's fit; it is formed when it is entered."""
    allocation: Allocation = train_loop_config["allocation"]
    stall_seconds = float(train_loop_config["config"]["cluster"]["stall"])
    store = Store(str(train_loop_config["config"]["run"]))
    context = ray.train.get_context()
    return open_process_group(
        _select_device(allocation),
        context.get_world_rank(),
        context.get_world_size(),
        broadcast_from_rank_zero,
        node_address=ray.util.get_node_ip_address(),
        timeout=group_timeout(stall_seconds),
        num_cores=allocation.cpus_per_worker,
        launch_id=train_loop_config["launch_id"],
        on_checkpoint=_make_checkpoint_reporter(store.redacted_url),
        desired_world_size=allocation.max_workers,
    )


def _report_group(world: World, mailbox: Any) -> None:
    """Send the node of each rank to the driver, and the placement group of the fit."""
    node_id = ray.get_runtime_context().get_node_id()
    rank_nodes = world.all_gather_object([node_id, ray.util.get_node_ip_address()])
    if world.is_rank_zero:
        placement_group = ray.util.get_current_placement_group()
        mailbox.send_message.remote("formed", (rank_nodes, placement_group))


def _listen_for_stop(world: World, mailbox: Any, fit: int) -> None:
    """Stop the world for the driver, and when this host will be taken away."""
    # Rank 0 asks the mailbox for all ranks; any of them may get a preemption notice.
    if world.is_rank_zero:
        _stop_when(world, lambda: ray.get(mailbox.wait_for_stop.remote(fit)))
    _stop_when(world, lambda: _preemption_notice.wait(60.0))


def _make_hang_logger(console: RemoteConsole, rank: int) -> Callable[[str, str], None]:
    """Return a watchdog callback for a rank whose process group has not formed yet."""

    def log_hang(sentence: str, stacks: str) -> None:
        console.log(f"rank {rank} hangs: {sentence}; its stacks:\n{stacks}")

    return log_hang


def _select_device(allocation: Allocation) -> torch.device:
    """Return the device that this rank computes on.

    Raises:
        AttemptError: Ray assigned a GPU that torch does not find. It is raised on this
            rank alone: the ranks cannot meet yet to agree on it.
    """
    if not allocation.gpus_per_worker:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise AttemptError(
            f"Ray gave a rank on {socket.gethostname()} a GPU, but torch finds none "
            "there: run nvidia-smi and torch.cuda.is_available() on that host, or set "
            "device=cpu"
        )
    device: torch.device = ray.train.torch.get_device()
    return device


def _stop_when(world: World, wait_for_stop: Callable[[], bool]) -> None:
    """Ask the world to stop once `wait_for_stop` returns True.

    It is called again and again, on a thread of its own: it should block for a while.
    """

    def wait_and_stop() -> None:
        while not wait_for_stop():
            continue
        world.stop_requested.set()

    threading.Thread(target=wait_and_stop, name="distrain-stop", daemon=True).start()


def _make_checkpoint_reporter(run: str) -> Callable[[int, str | None], None]:
    """Return a callback that reports each complete checkpoint to Ray, by its name.

    distrain writes the files. A Ray checkpoint that names them would be one more file,
    and a rank dies if Ray cannot write it.
    """

    def report_checkpoint(step: int, name: str | None) -> None:
        report: dict[str, Any] = {"step": step}
        if name is not None:
            report |= {"checkpoint": name, "run": run}
        ray.train.report(report)

    return report_checkpoint
