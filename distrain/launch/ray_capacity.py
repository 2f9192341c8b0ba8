"""Decide with how many workers a run on Ray starts, and when that number changes."""

import threading
import time
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from distrain.config import Config
from distrain.errors import RunError
from distrain.launch.allocation import (
    Allocation,
    ClusterNode,
    compute_allocation,
    count_fitting_workers,
    describe_idle_gpus,
    explain_shortage,
)
from distrain.monitor.sinks import Console

_POLL_SECONDS = 0.2
# An autoscaler keeps only the last request of all runs on the cluster: each run repeats
# its own.
_WORKER_REQUEST_SECONDS = 10.0
# Seconds for which the cluster must show the same before a run acts on it.
_STABLE_SECONDS = 3.0
# Seconds in which the previous workers may still hold their cores.
_GRACE_SECONDS = 3.0


class _StabilityTimer:
    """Stopwatch for how long a value has stayed the same."""

    def __init__(self) -> None:
        self._value: object = None
        self._since = 0.0

    def update(self, value: object) -> float:
        """Return the seconds since the value changed for the last time."""
        now = time.monotonic()
        if value != self._value:
            self._value = value
            self._since = now
        return now - self._since


class CapacityPlanner:
    """Chooses the number of workers of each fit, from the capacity of the cluster.

    A fit is one call of `TorchTrainer.fit()`: one Ray Train run with a fixed number of
    workers, over one attempt or several. The driver reports with `on_fit_started`,
    `on_group_formed` and `on_placement_failed` what becomes of the workers.
    """

    def __init__(
        self,
        config: Config,
        console: Console,
        mailbox: Any,
        stop_event: threading.Event,
        *,
        awaits_stable_cluster: bool,
    ) -> None:
        """Plan for a run.

        Args:
            config: the run.
            console: where a shortage and idle GPUs are logged.
            mailbox: the launch's mailbox, an actor on the head, where the cluster is
                seen best.
            stop_event: ends the wait for capacity when it is set.
            awaits_stable_cluster: before the first worker group, wait until the cluster
                does not grow any further.
        """
        self._config = config
        self._console = console
        self._mailbox = mailbox
        self._stop_event = stop_event
        self._awaits_stable_cluster = awaits_stable_cluster
        self.gpus_per_worker: int | None = None
        """GPUs of each rank, decided when the first worker group has formed."""
        # As of the last look at the cluster.
        self._allocation: Allocation | None = None
        # The node of each worker of the last worker group.
        self._worker_node_ids: list[str] = []
        # Size of the last worker group that Ray could not place as a whole.
        self._failed_group_size: int | None = None
        # Times on the monotonic clock.
        self._requested_at: float | None = None
        self._extra_capacity_since: float | None = None
        self._logged_messages: set[str] = set()

    def on_fit_started(self) -> None:
        """Forget the workers of the fit before."""
        self._worker_node_ids = []
        self._extra_capacity_since = None

    def on_group_formed(self, worker_node_ids: list[str]) -> None:
        """Record the workers' nodes; GPUs or CPUs are now fixed for the launch."""
        self._worker_node_ids = worker_node_ids
        self._failed_group_size = None
        if self._allocation is not None:
            self.gpus_per_worker = self._allocation.gpus_per_worker

    def on_placement_failed(self, num_workers: int) -> None:
        """Record that Ray could not place a group of this many workers."""
        self._failed_group_size = num_workers

    def wait_for_capacity(self) -> tuple[int, Allocation]:
        """Wait for room for the maximum, or, after 3 s, for at least the minimum.

        Returns:
            The number of workers to start with, and the resources of each.

        Raises:
            RunError: the run was stopped meanwhile, or `cluster.wait` seconds were not
                enough.
        """
        began = time.monotonic()
        stability = _StabilityTimer()
        needs_stability = self._awaits_stable_cluster and self.gpus_per_worker is None
        has_logged_shortage = False
        while not self._stop_event.is_set():
            # Until the grace time is over, plan with all cores; after that, with those
            # that are free.
            waited = time.monotonic() - began
            is_grace_over = waited > _GRACE_SECONDS
            nodes, allocation = self._refresh_allocation(only_available=is_grace_over)

            # The nodes of a cluster that starts come up one after another: wait for
            # all before the first worker group decides what the run computes on.
            stable_seconds = stability.update(
                (allocation.max_workers, allocation.gpus_per_worker)
            )
            if needs_stability and stable_seconds < _STABLE_SECONDS:
                time.sleep(_POLL_SECONDS)
                continue

            # Start with the maximum at once, or with fewer when the grace time is over.
            max_workers = self._limit_workers(allocation)
            num_fitting = count_fitting_workers(allocation, nodes, worker_node_ids=[])
            num_workers = min(max_workers, num_fitting)
            is_enough = is_grace_over and num_workers >= allocation.min_workers
            if num_workers == max_workers or is_enough:
                self._log_idle_gpus(allocation, num_workers, nodes)
                return num_workers, allocation

            # Too few: ask for more, and give up after `cluster.wait`.
            self._request_max_workers(allocation)
            shortage = explain_shortage(allocation, nodes)
            if is_grace_over and not has_logged_shortage:
                self._console.log(f"waiting for the cluster: {shortage}")
                has_logged_shortage = True
            if waited > self._config.cluster.wait:
                raise RunError(
                    f"{shortage}: add nodes, or lower cluster.workers or the resources "
                    "of each worker"
                )
            time.sleep(_POLL_SECONDS)
        raise RunError(
            "stopped while waiting for the cluster: run the same command to resume"
        )

    def _limit_workers(self, allocation: Allocation) -> int:
        """Return the maximum, or one worker fewer than the group that failed.

        A failed group of the minimum or fewer is ignored: the maximum is tried again.
        """
        failed_size = self._failed_group_size
        if failed_size is None or failed_size <= allocation.min_workers:
            return allocation.max_workers
        return min(allocation.max_workers, failed_size - 1)

    def _log_idle_gpus(
        self, allocation: Allocation, num_workers: int, nodes: list[ClusterNode]
    ) -> None:
        """Log GPUs that stay idle; the same sentence only once in a launch."""
        idle = describe_idle_gpus(self._config, allocation, num_workers, nodes)
        if idle is not None and idle not in self._logged_messages:
            self._logged_messages.add(idle)
            self._console.log(idle)

    def find_resize_reason(
        self, num_workers: int, allocation: Allocation
    ) -> str | None:
        """Return why the number of workers should change, or None if it should not.

        A node that is drained is a reason at once, room for more workers only once it
        has lasted for some seconds.

        Args:
            num_workers: workers of the current fit.
            allocation: the resources that they hold.
        """
        # The limits as they are now; the cores of a worker stay until the next fit.
        nodes, current = self._refresh_allocation()
        allocation = current._replace(cpus_per_worker=allocation.cpus_per_worker)

        # Leave nodes that will be taken away.
        drained = sorted(
            node.address
            for node in nodes
            if node.draining and node.id in self._worker_node_ids
        )
        if drained:
            return f"{', '.join(drained)} is being drained"

        # Grow.
        if num_workers < allocation.max_workers:
            self._request_max_workers(allocation)
        num_fitting = count_fitting_workers(allocation, nodes, self._worker_node_ids)
        capacity = min(allocation.max_workers, num_fitting)
        if capacity <= num_workers:
            self._extra_capacity_since = None
            return None
        now = time.monotonic()
        if self._extra_capacity_since is None:
            self._extra_capacity_since = now
        if now - self._extra_capacity_since < _STABLE_SECONDS:
            return None
        return f"there is room for {capacity} workers, {capacity - num_workers} more"

    def _refresh_allocation(
        self, *, only_available: bool = False
    ) -> tuple[list[ClusterNode], Allocation]:
        """List the cluster's nodes, and compute what the run may use of them.

        Args:
            only_available: divide only the cores that no job holds.
        """
        nodes: list[ClusterNode] = ray.get(self._mailbox.list_nodes.remote())
        self._allocation = compute_allocation(
            self._config,
            nodes,
            gpus_per_worker=self.gpus_per_worker,
            only_available=only_available,
        )
        return nodes, self._allocation

    def _request_max_workers(self, allocation: Allocation) -> None:
        """Ask the autoscaler for the maximum, at most once per 10 s."""
        now = time.monotonic()
        if (
            self._requested_at is not None
            and now - self._requested_at < _WORKER_REQUEST_SECONDS
        ):
            return
        self._requested_at = now
        self._mailbox.request_workers.remote(
            allocation, allocation.max_workers, self._worker_node_ids
        )

    def cancel_request(self) -> None:
        """Withdraw what was asked of the autoscaler, if anything was."""
        if self._requested_at is None:
            return
        # A head that is gone has forgotten the request anyway.
        with suppress(RayError):
            ray.get(
                self._mailbox.request_workers.remote(self._allocation, 0, []),
                timeout=10,
            )
