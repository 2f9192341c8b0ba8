"""Driver of a run on Ray: Ray Train runs the ranks, and the driver watches over it.

One `fit` of Ray Train has a fixed number of workers; when a worker dies, Ray restarts
the whole worker group: another attempt in the same fit. A change of the number (a node
is lost, added or drained) ends the fit, after a checkpoint if there is time for one,
and the next fit resumes from there. A launch is one fit or several.

All this rests on Ray's public interface. What is private only adds details (two
functions on nodes, an attribute with the cause of an exception) or silences prints (a
function that is replaced); without it, messages and the list of nodes are coarser.

A worker group has *formed* once its ranks are connected: they have initialized their
process group and run a first collective.
"""

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import ControllerError

from distrain.config import Config
from distrain.errors import RunError, UserError
from distrain.launch.allocation import Allocation, choose_num_workers
from distrain.launch.local import compute_local_allocation
from distrain.launch.mailbox import create_mailbox
from distrain.launch.ray_capacity import CapacityPlanner
from distrain.launch.ray_cluster import (
    RAY_HEAD_ENV,
    connect_to_ray,
    summarize_error,
)
from distrain.launch.ray_trainer import build_trainer
from distrain.launch.signals import STOPPING_LINE, stop_on_signals
from distrain.monitor.records import record_from_dict
from distrain.monitor.sinks import Console
from distrain.trainer import Summary

_NODE_POLL_SECONDS = 2.0


def train_on_ray(
    config: Config,
    console: Console,
    *,
    address: str | None,
    must_resume: bool = False,
    accept_other_hardware: bool = False,
) -> tuple[Summary, int | None]:
    """Train on a Ray cluster, or on workers on this machine.

    Args:
        config: the run.
        console: where progress is printed.
        address: of the cluster (auto, host:port, ray://host:port); None: start a
            local Ray cluster.
        must_resume: fail if there is no checkpoint.
        accept_other_hardware: resume even if this hardware does not reproduce the
            checkpoint's bits.

    Returns:
        The summary, and the number of the signal that stopped the run early, or None.

    Raises:
        UserError, RunError: as `train`; too many failures without a new checkpoint.
    """
    config = _make_paths_absolute(config)
    local_resources: dict[str, int] = {}
    if address is None:
        config, local_resources = configure_local_ray(config)
    options = {
        "must_resume": must_resume,
        "accept_other_hardware": accept_other_hardware,
    }
    with connect_to_ray(address, console, **local_resources):
        stop = threading.Event()
        try:
            # Handle signals before the mailbox exists: `distrain drain` finds this
            # process by it, and sends SIGTERM.
            with stop_on_signals(stop.set) as received:
                driver = _RayDriver(config, console, address, options, stop)
                summary = driver.run_until_finished()
        except (RayError, ConnectionError) as error:
            raise RunError(
                f"lost the Ray cluster ({summarize_error(error)}): when it is back, "
                "run the same command to resume"
            ) from error
    was_stopped = bool(received) and summary.status == "stopped"
    return summary, received[0] if was_stopped else None


def _make_paths_absolute(config: Config) -> Config:
    """Make local paths absolute: Ray's workers have another working directory."""

    def to_absolute(url: str | None) -> str | None:
        return url if url is None or "://" in url else os.path.abspath(url)

    data_paths = {
        name: to_absolute(getattr(config.data, name))
        for name in ("train", "val", "cache")
    }
    data = config.data.model_copy(update=data_paths)
    init_from = to_absolute(config.model.init_from)
    changes = {
        "run": to_absolute(config.run),
        "data": data,
        "model": config.model.model_copy(update={"init_from": init_from}),
    }
    return config.model_copy(update=changes)


def configure_local_ray(config: Config) -> tuple[Config, dict[str, int]]:
    """Return the config for a local Ray cluster, and the resources that it gets.

    The limits [MIN, MAX] become [MIN, the workers that fit, at least MIN and at most
    MAX], since a machine does not grow; `auto` stays. Workers on CPUs may be more than
    there are cores, if the user asks for so many.

    Raises:
        UserError: there are fewer GPUs than workers.
    """
    allocation, nodes = compute_local_allocation(config)
    machine = nodes[0].total_resources
    needed_cpus = allocation.min_workers * allocation.cpus_per_worker
    resources = {
        "cpus": max(int(machine["CPU"]), needed_cpus),
        "gpus": int(machine["GPU"]) if allocation.gpus_per_worker else 0,
    }
    if config.cluster.workers != "auto":
        max_workers = choose_num_workers(allocation, nodes)
        cluster = config.cluster.model_copy(
            update={"workers": (allocation.min_workers, max_workers)}
        )
        config = config.model_copy(update={"cluster": cluster})
    return config, resources


@dataclass
class _FitOutcome:
    """End of one fit."""

    value: dict[str, Any] | None = None
    """Return value of rank 0: a summary, or status and text of an error."""
    error: BaseException | None = None
    """Exception that Ray Train raised in place of a return value."""
    is_resize: bool = False
    """True if the driver asked the ranks to stop, for another number of workers."""


class _RayDriver:
    """Driver of one launch, with as many fits as it takes."""

    def __init__(
        self,
        config: Config,
        console: Console,
        address: str | None,
        options: Mapping[str, bool],
        stop: threading.Event,
    ) -> None:
        self._config = config
        self._console = console
        self._stop_event = stop
        self._launch_options = {"launch_id": os.urandom(8).hex(), **options}
        self._mailbox = create_mailbox()
        self._warn_about_head_env()
        # A Ray on this machine has all its resources from the start, a cluster may not.
        is_auto = config.cluster.workers == "auto"
        self._capacity = CapacityPlanner(
            config,
            console,
            self._mailbox,
            stop,
            awaits_stable_cluster=address is not None and is_auto,
        )

        self._fit_number = 0
        # Node id and address of each rank, once the group of the fit has formed.
        self._rank_nodes: list[tuple[str, str]] = []
        # Placement group of the current fit, removed when the fit ends.
        self._placement_group: Any = None
        # Steps done, as far as the driver has heard, and at the last start of training.
        self._last_step = 0
        self._start_step = 0
        # When training was interrupted, on the monotonic clock; None: it is running.
        self._interrupted_at: float | None = None
        # Causes of failures since the last progress.
        self._failure_causes: list[str] = []
        # Consecutive worker groups that were lost before they had formed.
        self._num_failed_starts = 0
        self._formed_since_failure = False

    def _warn_about_head_env(self) -> None:
        missing = [
            f"{name}={value}"
            for name, value in RAY_HEAD_ENV.items()
            if not ray.get(self._mailbox.get_env.remote(name))
        ]
        if missing:
            self._console.log(
                "a lost node will be noticed only after about a minute: to notice it "
                f"sooner, start the cluster's head with {' '.join(missing)}"
            )

    def run_until_finished(self) -> Summary:
        """Run one fit after another until the run has ended.

        Raises:
            UserError, RunError: raised by the ranks, or the run cannot make progress.
        """
        try:
            return self._fit_until_finished()
        finally:
            self._capacity.cancel_request()

    def _fit_until_finished(self) -> Summary:
        # Consecutive fits in which no worker group formed.
        num_groupless_fits = 0
        while True:
            num_workers, allocation = self._capacity.wait_for_capacity()
            outcome = self._run_one_fit(num_workers, allocation)

            # Ray failed: the next fit resumes, unless no worker group forms at all.
            if outcome.value is None:
                self._record_fit_error(outcome.error, num_workers)
                num_groupless_fits = 0 if self._rank_nodes else num_groupless_fits + 1
                if num_groupless_fits >= self._config.cluster.max_failures:
                    raise RunError(
                        f"{num_groupless_fits} runs of Ray Train in a row ended before "
                        f"their workers were connected{self._format_first_cause()}"
                    )
                continue

            # The ranks raised an error on which all agree.
            if "text" in outcome.value:
                is_user_error = outcome.value["status"] == "UserError"
                error_class = UserError if is_user_error else RunError
                raise error_class(outcome.value["text"] + self._format_first_cause())

            # The ranks stopped although the user did not ask for it: resume.
            is_stopped = outcome.value["status"] == "stopped"
            if is_stopped and not self._stop_event.is_set():
                if not outcome.is_resize:
                    self._console.log(
                        "a worker received SIGTERM: saved, resuming without losing a "
                        "step"
                    )
                    self._interrupted_at = time.monotonic()
                continue
            return Summary.from_dict(outcome.value)

    def _run_one_fit(self, num_workers: int, allocation: Allocation) -> _FitOutcome:
        """Run one fit until it ends.

        Raises:
            RunError: too many consecutive worker groups were lost before they formed.
        """
        self._fit_number += 1
        self._rank_nodes = []
        self._capacity.on_fit_started()
        outcome = _FitOutcome()
        is_abandoned = threading.Event()

        def run_trainer() -> None:
            try:
                launch_options = {**self._launch_options, "fit": self._fit_number}
                trainer = build_trainer(
                    self._config, num_workers, allocation, launch_options, self._mailbox
                )
                outcome.value = trainer.fit().return_value
            except BaseException as error:
                outcome.error = error
            # Wake `_handle_messages`, which ignores this kind of message.
            if not is_abandoned.is_set():
                self._mailbox.send_message.remote("ended", None)

        # Ray's fit blocks: a thread of its own keeps the driver free for messages.
        thread = threading.Thread(target=run_trainer, name="distrain-fit", daemon=True)
        thread.start()
        try:
            outcome.is_resize = self._watch_fit(thread, num_workers, allocation)
        except RunError:
            is_abandoned.set()
            raise
        thread.join()
        # Messages that were sent before the fit ended.
        self._handle_messages(0.0)
        self._remove_placement_group()
        return outcome

    def _watch_fit(
        self, thread: threading.Thread, num_workers: int, allocation: Allocation
    ) -> bool:
        """Handle messages and ask the ranks to stop when needed, until a fit ends.

        Returns:
            True if the ranks were asked to stop for another number of workers.

        Raises:
            RunError: too many consecutive worker groups were lost before they formed.
        """
        is_stop_requested = False
        is_resize = False
        last_poll = time.monotonic()
        while thread.is_alive():
            self._handle_messages(1.0)

            # Ray would restart such groups forever.
            if self._num_failed_starts >= self._config.cluster.max_failures:
                raise RunError(
                    f"{self._num_failed_starts} worker groups in a row were lost "
                    "before their workers were connected"
                    f"{self._format_first_cause()}"
                )

            # Stop for the user.
            if self._stop_event.is_set() and not is_stop_requested:
                self._console.log(STOPPING_LINE)
                is_stop_requested = True
                self._mailbox.request_stop.remote(self._fit_number)

            # Resize only once the group has formed, and after an interruption only once
            # training has resumed: a group that is starting cannot save. (In the first
            # fit the request may come before training starts; it is then honored after
            # the first step.)
            now = time.monotonic()
            may_resize = bool(self._rank_nodes) and self._interrupted_at is None
            is_poll_due = now - last_poll >= _NODE_POLL_SECONDS
            if is_stop_requested or not may_resize or not is_poll_due:
                continue
            last_poll = now
            reason = self._capacity.find_resize_reason(num_workers, allocation)
            if reason is not None:
                self._console.log(
                    f"{reason}: saving, then resuming without losing a step"
                )
                is_stop_requested = True
                is_resize = True
                self._interrupted_at = now
                self._mailbox.request_stop.remote(self._fit_number)
        return is_resize

    def _remove_placement_group(self) -> None:
        """Remove the fit's placement group.

        A controller of Ray Train that died leaves it reserved. Ray cleans up such
        groups by itself only while its dashboard runs.
        """
        if self._placement_group is not None:
            ray.util.remove_placement_group(self._placement_group)
            self._placement_group = None

    def _handle_messages(self, timeout_seconds: float) -> None:
        """Handle the messages of ranks and controller; wait for the first if none."""
        messages = ray.get(self._mailbox.receive_messages.remote(timeout_seconds))
        for kind, value in messages:
            if kind == "event":
                self._console.log(value)
            elif kind == "formed":
                self._on_group_formed(*value)
            elif kind == "rank_errors":
                self._on_rank_errors(value)
            elif kind == "start":
                self._on_training_started(**value)
            elif kind == "advance":
                self._last_step = max(self._last_step, value)
                self._console.set_step(value)
            elif kind == "record":
                record = record_from_dict(value)
                self._last_step = max(self._last_step, record.step)
                self._console.log_metrics(record)
            elif kind == "stop":
                self._console.stop()

    def _on_group_formed(
        self, rank_nodes: list[tuple[str, str]], placement_group: Any
    ) -> None:
        """Record a new worker group, and log its ranks by host."""
        self._rank_nodes = rank_nodes
        self._placement_group = placement_group
        self._capacity.on_group_formed([node_id for node_id, _ in rank_nodes])
        self._formed_since_failure = True
        self._num_failed_starts = 0
        hosts = [address for _, address in rank_nodes]
        ranks_by_host = ", ".join(
            f"{hosts.count(host)} on {host}" for host in sorted(set(hosts))
        )
        workers = f"{len(hosts)} worker{'s' * (len(hosts) > 1)}"
        if self._capacity.gpus_per_worker:
            workers += " with a GPU each"
        self._console.log(f"worker group formed: {workers} ({ranks_by_host})")

    def _on_training_started(self, step: int, steps: int, steps_per_epoch: int) -> None:
        """Record that training has started; log what an interruption before it cost."""
        # A new checkpoint is progress: what failed before it is settled.
        if step > self._start_step:
            self._failure_causes.clear()
        if self._interrupted_at is not None:
            seconds = time.monotonic() - self._interrupted_at
            # About: the driver knows the last step only as of the last message.
            num_lost = max(0, self._last_step - step)
            lost = f"about {num_lost} steps" if num_lost else "no step"
            self._console.log(
                f"training resumed after {seconds:.1f} s, from step {step}: "
                f"{lost} recomputed"
            )
            self._interrupted_at = None
        self._start_step = step
        self._last_step = step
        self._console.start(step=step, steps=steps, steps_per_epoch=steps_per_epoch)

    def _on_rank_errors(self, reasons: Mapping[int, str]) -> None:
        """Record why ranks ended; count a worker group that had not formed."""
        if not self._formed_since_failure:
            self._num_failed_starts += 1
        self._formed_since_failure = False
        for rank, reason in sorted(reasons.items()):
            host = ""
            if rank < len(self._rank_nodes):
                host = f" on {self._rank_nodes[rank][1]}"
            self._record_failure(f"lost rank {rank}{host}: {reason}")

    def _record_fit_error(self, error: BaseException | None, num_workers: int) -> None:
        """Record why a fit ended without a result of its ranks."""
        # Only the exception's class name tells a placement timeout from other failures
        # of the controller.
        if (
            isinstance(error, ControllerError)
            and "Timeout" in type(error.controller_failure).__name__
        ):
            self._capacity.on_placement_failed(num_workers)
            self._record_failure(
                f"the cluster no longer has room for {num_workers} workers"
            )
        else:
            self._record_failure(f"Ray Train failed: {summarize_error(error)}")

    def _record_failure(self, cause: str) -> None:
        """Log a failure, keep its cause, and start the clock of the interruption."""
        self._console.stop()
        self._console.log(cause)
        self._failure_causes.append(cause)
        # The interruption began with its first failure.
        self._interrupted_at = self._interrupted_at or time.monotonic()

    def _format_first_cause(self) -> str:
        if not self._failure_causes:
            return ""
        return f"; the first failure was: {self._failure_causes[0]}"
