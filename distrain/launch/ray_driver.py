"""Cluster mode: Ray Train runs the training function on workers, and this watches over it.

One `fit` of Ray's has a fixed number of workers and replaces processes that die. What changes the number (a node that
is lost, added or drained) ends the fit, after a checkpoint where there is time for one, and the next fit goes on from
there. This rests on Ray's public interface; two private calls sharpen the view of the cluster, and have fallbacks.
"""

import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import ControllerError

from distrain.config import Config
from distrain.errors import RunError, UserError
from distrain.launch.allocation import (
    Allocation,
    ClusterNode,
    choose_num_workers,
    compute_allocation,
    count_fitting_workers,
    describe_idle_gpus,
    explain_shortage,
)
from distrain.launch.local import compute_local_allocation
from distrain.launch.mailbox import Mailbox, make_mailbox_name
from distrain.launch.ray_cluster import RAY_HEAD_ENV, connect_to_ray, summarize_error
from distrain.launch.ray_trainer import build_trainer
from distrain.launch.signals import stop_on_signals
from distrain.monitor.records import record_from_dict
from distrain.monitor.sinks import Console
from distrain.train import Summary

_NODE_POLL_SECONDS = 2.0
# An autoscaler hears what the last run asked for: runs that share a cluster say it again and again.
_WORKER_REQUEST_SECONDS = 10.0
# Seconds for which more room must be there before a run grows into it.
_STABLE_SECONDS = 3.0


def train_on_ray(
    config: Config,
    console: Console,
    *,
    address: str | None,
    must_resume: bool = False,
    accept_other_hardware: bool = False,
) -> tuple[Summary, int | None]:
    """Train on a Ray cluster, or on workers on this machine; the summary, and the signal that stopped it if one did.

    Args:
        config: the run.
        console: what a person sees.
        address: of the cluster (auto, host:port, ray://host:port); None: a Ray of its own, on this machine.
        must_resume: it is a mistake if there is no checkpoint.
        accept_other_hardware: go on where the hardware computes other bits than before.

    Raises:
        UserError, RunError: as `train`; too many failures without a new checkpoint.
    """
    config = _make_paths_absolute(config)
    own: dict[str, int] = {}
    if address is None:
        config, own = _configure_local_ray(config)
    with connect_to_ray(address, console, **own):
        try:
            stop = threading.Event()
            with stop_on_signals(
                stop.set
            ) as received:  # before `distrain drain` can find this process
                options = {
                    "must_resume": must_resume,
                    "accept_other_hardware": accept_other_hardware,
                }
                summary = _RayDriver(
                    config, console, address, options, stop
                ).run_until_finished()
        except (RayError, ConnectionError) as error:
            raise RunError(
                f"the Ray cluster is gone ({summarize_error(error)}): when it is back, run the same command to go on"
            ) from error
    return summary, received[0] if received and summary.status == "stopped" else None


def _configure_local_ray(config: Config) -> tuple[Config, dict[str, int]]:
    """The config for a Ray of our own, with as many workers as fit; and what that Ray has to give.

    Workers on CPUs may be more than there are cores, where so many are asked for.

    Raises:
        UserError: there are fewer GPUs than workers.
    """
    share, nodes = compute_local_allocation(config)
    has = nodes[0].total_resources
    resources = {
        "cpus": max(int(has["CPU"]), share.min_workers * share.cpus_per_worker),
        "gpus": int(has["GPU"]) if share.gpus_per_worker else 0,
    }
    if config.cluster.workers != "auto":
        cluster = config.cluster.model_copy(
            update={"workers": (share.min_workers, choose_num_workers(share, nodes))}
        )
        config = config.model_copy(update={"cluster": cluster})
    return config, resources


class _RayDriver:
    """One launch: as many fits as it takes."""

    def __init__(
        self,
        config: Config,
        console: Console,
        address: str | None,
        options: Mapping[str, bool],
        stop: threading.Event,
    ) -> None:
        self._stop_event = stop
        self._config, self._console = config, console
        self._rank_options = {"session": os.urandom(8).hex(), **options}
        # On the head, which outlives every worker's node.
        where = {"node:__internal_head__": 0.001}
        actor = ray.remote(
            num_cpus=0, resources=where, max_restarts=-1, max_task_retries=-1
        )(Mailbox)
        self._mailbox: Any = actor.options(name=make_mailbox_name()).remote()
        missing = [
            f"{k}={v}"
            for k, v in RAY_HEAD_ENV.items()
            if not ray.get(self._mailbox.get_env.remote(k))
        ]
        if missing:
            console.log(
                "a node that vanishes will be noticed late, after a minute or so: to be faster, start the cluster's "
                f"head with {' '.join(missing)}"
            )
        self._fit_number = 0
        self._rank_nodes: list[tuple[str, str]] = []  # node and address of each rank
        self._placement_group: Any = None  # Ray's reservation of resources for the fit
        self._last_step = self._start_step = 0
        self._interrupted_at: float | None = None
        self._failure_causes: list[str] = []
        self._unplaceable_workers: int | None = None
        self._requested_at: float | None = None
        self._allocation: Allocation | None = None  # counted at each look
        self._gpus_per_worker: int | None = (
            None  # of each rank; decided when the first group has formed
        )
        self._awaits_stable_cluster = (
            address is not None and config.cluster.workers == "auto"
        )
        self._formed_since_failure = False  # since the last loss
        self._num_failed_starts = (
            0  # worker groups in a row that were lost before they had formed
        )
        self._logged_messages: set[str] = set()

    def run_until_finished(self) -> Summary:
        """Fit again and again, until the run has ended."""
        try:
            return self._fit_until_finished()
        finally:
            if self._requested_at is not None:
                with suppress(RayError):  # a head that is gone has forgotten it anyway
                    ray.get(
                        self._mailbox.request_workers.remote(self._allocation, 0, []),
                        timeout=10,
                    )

    def _fit_until_finished(self) -> Summary:
        barren = 0  # fits in a row in which no group was formed
        while True:
            workers, share = self._wait_for_capacity()
            self._rank_nodes = []
            found, error, resizing = self._run_one_fit(workers, share)
            if found is not None and "text" in found:
                kind = UserError if found["status"] == "UserError" else RunError
                raise kind(found["text"] + self._format_first_cause())
            if (
                found is not None
                and found["status"] == "stopped"
                and not self._stop_event.is_set()
            ):
                if not resizing:
                    self._console.log(
                        "a worker was told to end (SIGTERM): saved, going on without losing a step"
                    )
                    self._interrupted_at = time.monotonic()
                continue
            if found is not None:
                return Summary.from_dict(found)
            reason = summarize_error(error)
            barren = 0 if self._rank_nodes else barren + 1
            if (
                isinstance(error, ControllerError)
                and "Timeout" in type(error.controller_failure).__name__
            ):
                self._unplaceable_workers = workers
                self._record_failure(f"there is no room for {workers} workers any more")
            else:
                self._record_failure(f"Ray's controller: {reason}")
            if barren >= self._config.cluster.max_failures:
                raise RunError(
                    f"Ray could not form a worker group {barren} times{self._format_first_cause()}"
                )

    def _run_one_fit(
        self, num_workers: int, allocation: Allocation
    ) -> tuple[dict[str, Any] | None, BaseException | None, bool]:
        """One fit: what the lead returned or what it raised, and whether it was asked to end for a resize."""
        self._fit_number += 1
        result: dict[str, Any] = {}

        def run_trainer() -> None:
            try:
                order = {**self._rank_options, "fit": self._fit_number}
                result["found"] = (
                    build_trainer(
                        self._config, num_workers, allocation, order, self._mailbox
                    )
                    .fit()
                    .return_value
                )
            except BaseException as error:
                result["error"] = error
            if not given_up.is_set():
                self._mailbox.send_message.remote("ended", None)

        given_up = threading.Event()
        thread = threading.Thread(target=run_trainer, name="distrain-fit", daemon=True)
        thread.start()
        asked, resizing, room_since, looked = False, False, None, time.monotonic()
        while thread.is_alive():
            self._handle_messages(1.0)
            if self._num_failed_starts >= self._config.cluster.max_failures:
                given_up.set()
                raise RunError(
                    f"no worker group could be formed, {self._num_failed_starts} times in a row{self._format_first_cause()}"
                )
            if self._stop_event.is_set() and not asked:
                self._console.log("stopping: saving first (once more ends it at once)")
                asked = True
                self._mailbox.request_stop.remote(self._fit_number)
            now = time.monotonic()
            if (
                asked
                or not self._rank_nodes
                or self._interrupted_at is not None
                or now - looked < _NODE_POLL_SECONDS
            ):
                continue
            looked = now
            why, room_since = self._find_resize_reason(
                num_workers, allocation, room_since
            )
            if why:
                self._console.log(f"{why}: saving, then going on without losing a step")
                asked = resizing = True
                self._interrupted_at = now
                self._mailbox.request_stop.remote(self._fit_number)
        thread.join()
        self._handle_messages(0.0)
        if (
            self._placement_group is not None
        ):  # a controller that died has left it, and Ray itself needs its dashboard to see that
            ray.util.remove_placement_group(self._placement_group)
            self._placement_group = None
        return result.get("found"), result.get("error"), resizing

    def _handle_messages(self, timeout_seconds: float) -> None:
        """Show what ranks and controller told."""
        for kind, value in ray.get(
            self._mailbox.receive_messages.remote(timeout_seconds)
        ):
            if kind == "event":
                self._console.log(value)
            elif kind == "formed":
                self._on_group_formed(*value)
            elif kind == "lost":
                self._on_ranks_lost(value)
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
        self._rank_nodes, self._placement_group, self._unplaceable_workers = (
            rank_nodes,
            placement_group,
            None,
        )
        self._gpus_per_worker = (
            self._allocation.gpus_per_worker if self._allocation else None
        )
        self._formed_since_failure, self._num_failed_starts = True, 0
        hosts = [address for _, address in rank_nodes]
        where = ", ".join(
            f"{hosts.count(host)} on {host}" for host in sorted(set(hosts))
        )
        what = (
            " with a GPU each"
            if self._allocation and self._allocation.gpus_per_worker
            else ""
        )
        self._console.log(
            f"worker group formed: {len(hosts)} worker{'s' * (len(hosts) > 1)}{what} ({where})"
        )

    def _on_training_started(self, step: int, steps: int, steps_per_epoch: int) -> None:
        if step > self._start_step:
            self._failure_causes.clear()
        if self._interrupted_at is not None:
            again = max(0, self._last_step - step)
            self._console.log(
                f"training again after {time.monotonic() - self._interrupted_at:.1f} s, from step {step}: "
                f"{f'about {again} steps' if again else 'no step'} computed again"
            )
            self._interrupted_at = None
        self._start_step = self._last_step = step
        self._console.start(step=step, steps=steps, steps_per_epoch=steps_per_epoch)

    def _on_ranks_lost(self, reasons: Mapping[int, str]) -> None:
        self._num_failed_starts += not self._formed_since_failure
        self._formed_since_failure = False
        for rank, text in sorted(reasons.items()):
            host = (
                f" on {self._rank_nodes[rank][1]}"
                if rank < len(self._rank_nodes)
                else ""
            )
            self._record_failure(f"lost rank {rank}{host}: {text}")

    def _record_failure(self, cause: str) -> None:
        self._console.stop()
        self._console.log(cause)
        self._failure_causes.append(cause)
        self._interrupted_at = self._interrupted_at or time.monotonic()

    def _format_first_cause(self) -> str:
        return (
            f"; the first cause was: {self._failure_causes[0]}"
            if self._failure_causes
            else ""
        )

    def _request_max_workers(self, allocation: Allocation) -> None:
        now = time.monotonic()
        if (
            self._requested_at is None
            or now - self._requested_at >= _WORKER_REQUEST_SECONDS
        ):
            self._requested_at = now
            held = [node for node, _ in self._rank_nodes]
            self._mailbox.request_workers.remote(
                allocation, allocation.max_workers, held
            )

    def _refresh_allocation(
        self, *, only_available: bool = False
    ) -> tuple[list[ClusterNode], Allocation]:
        """The cluster's nodes, and what the run may take of them; `beside`: beside what others hold."""
        nodes: list[ClusterNode] = ray.get(self._mailbox.list_nodes.remote())
        self._allocation = compute_allocation(
            self._config,
            nodes,
            gpus_per_worker=self._gpus_per_worker,
            only_available=only_available,
        )
        return nodes, self._allocation

    def _wait_for_capacity(self) -> tuple[int, Allocation]:
        """The number of workers to start with, and what each holds, as soon as there is room for the least.

        Raises:
            RunError: told to stop meanwhile, or there is none for too long.
        """
        began, told = time.monotonic(), False
        steady, counted = began, None  # since when the cluster shows the same
        while not self._stop_event.is_set():
            waited = time.monotonic() - began
            nodes, share = self._refresh_allocation(
                only_available=waited > _STABLE_SECONDS
            )  # what our last workers held is free by then
            most = share.max_workers
            if (
                self._unplaceable_workers is not None
                and self._unplaceable_workers > share.min_workers
            ):
                most = min(most, self._unplaceable_workers - 1)
            if counted != (share.max_workers, share.gpus_per_worker):
                steady, counted = (
                    time.monotonic(),
                    (share.max_workers, share.gpus_per_worker),
                )
            if (
                self._awaits_stable_cluster
                and self._gpus_per_worker is None
                and time.monotonic() - steady < _STABLE_SECONDS
            ):
                time.sleep(0.2)  # its nodes may be coming up one after another
                continue
            found = min(most, count_fitting_workers(share, nodes, worker_node_ids=[]))
            if found == most or (
                found >= share.min_workers and waited > _STABLE_SECONDS
            ):
                self._log_once(describe_idle_gpus(self._config, share, found, nodes))
                return found, share
            self._request_max_workers(share)
            if not told and waited > _STABLE_SECONDS:
                told = True
                self._console.log(
                    f"waiting for the cluster: {explain_shortage(share, nodes)}"
                )
            if waited > self._config.cluster.wait:
                why = explain_shortage(share, nodes)
                raise RunError(
                    f"{why}: add nodes, or lower cluster.workers or what each asks for"
                )
            time.sleep(0.2)
        raise RunError(
            "stopped while it waited for room to train: run the same command to go on"
        )

    def _log_once(self, sentence: str | None) -> None:
        """Show a sentence, once in a launch."""
        if sentence is not None and sentence not in self._logged_messages:
            self._logged_messages.add(sentence)
            self._console.log(sentence)

    def _find_resize_reason(
        self, num_workers: int, allocation: Allocation, capacity_since: float | None
    ) -> tuple[str | None, float | None]:
        """Why the number of workers, which hold `share`, should change; and since when there has been room for more."""
        nodes, now = self._refresh_allocation()
        allocation = now._replace(cpus_per_worker=allocation.cpus_per_worker)
        held = [node for node, _ in self._rank_nodes]
        drained = sorted(
            node.address for node in nodes if node.draining and node.id in held
        )
        if drained:
            return f"{', '.join(drained)} is being drained", None
        if num_workers < allocation.max_workers:
            self._request_max_workers(allocation)
        found = min(
            allocation.max_workers,
            count_fitting_workers(allocation, nodes, worker_node_ids=held),
        )
        if found <= num_workers:
            return None, None
        since = capacity_since or time.monotonic()
        if time.monotonic() - since < _STABLE_SECONDS:
            return None, since
        return f"there is room for {found} workers, {found - num_workers} more", None


def _make_paths_absolute(config: Config) -> Config:
    """The same config for processes that start in other folders."""

    def to_absolute(url: str | None) -> str | None:
        return url if url is None or "://" in url else os.path.abspath(url)

    paths = ("train", "val", "cache")
    data = config.data.model_copy(
        update={name: to_absolute(getattr(config.data, name)) for name in paths}
    )
    return config.model_copy(update={"run": to_absolute(config.run), "data": data})
