"""Mailbox between the ranks and the driver of a run on Ray.

It does not load torch: the start of every run would wait for that import. The
mailbox's name in Ray identifies the process that drives the run, for `distrain drain`.
"""

import asyncio
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util import list_named_actors

from distrain.launch.allocation import Allocation, ClusterNode
from distrain.launch.ray_cluster import (
    HEAD_NODE_RESOURCE,
    list_nodes,
    request_workers,
)

_DRIVER_NAME_PREFIX = "distrain-driver"
_BOOT_ID_PATH = Path("/proc/sys/kernel/random/boot_id")
# Seconds after which `wait_for_stop` returns to a rank that then calls it again.
_STOP_POLL_SECONDS = 60.0


def make_mailbox_name() -> str:
    """Return a name for the mailbox of a run that this process drives."""
    namespace = _identify_pid_namespace()
    suffix = secrets.token_hex(4)
    return f"{_DRIVER_NAME_PREFIX} {namespace} {os.getpid()} {suffix}"


def list_local_drivers() -> list[int]:
    """List the ids of processes that drive runs and can be signaled from here."""
    prefix = [_DRIVER_NAME_PREFIX, _identify_pid_namespace()]
    names = [
        actor["name"].split(" ") for actor in list_named_actors(all_namespaces=True)
    ]
    return sorted(int(name[2]) for name in names if name[:2] == prefix)


def _identify_pid_namespace() -> str:
    """Identify the machine since its boot, and the PID namespace of this process.

    A process id means the same process only where both are equal.
    """
    try:
        container = os.readlink("/proc/self/ns/pid")
        return f"{_BOOT_ID_PATH.read_text().strip()}:{container}"
    except OSError:
        # Not Linux: a name that equals no other, so that no process is signaled.
        return secrets.token_hex(16)


class Mailbox:
    """Actor between the driver and the ranks.

    Messages for the console go to the driver; the request to stop goes to the ranks. It
    runs on the cluster's head, and so answers for the cluster too.
    """

    def __init__(self) -> None:
        self._messages: list[tuple[str, Any]] = []
        # Number of the last fit that was asked to stop: fits count from 1.
        self._last_stopped_fit = 0
        # Notified at each new message and each request to stop.
        self._change_condition = asyncio.Condition()

    async def send_message(self, kind: str, value: Any) -> None:
        """Leave a message for the driver."""
        async with self._change_condition:
            self._messages.append((kind, value))
            self._change_condition.notify_all()

    async def receive_messages(self, timeout_seconds: float) -> list[tuple[str, Any]]:
        """Return the messages since the last call, as (kind, value).

        If there are none, wait at most `timeout_seconds` for the first.
        """
        async with self._change_condition:
            if not self._messages:
                try:
                    await asyncio.wait_for(
                        self._change_condition.wait_for(lambda: self._messages),
                        timeout_seconds,
                    )
                except asyncio.TimeoutError:
                    return []
            messages = self._messages
            self._messages = []
            return messages

    async def request_stop(self, fit: int) -> None:
        """Ask the ranks of a fit to save and end."""
        async with self._change_condition:
            self._last_stopped_fit = fit
            self._change_condition.notify_all()

    async def wait_for_stop(self, fit: int) -> bool:
        """Return True once the ranks of a fit shall stop, False after 60 s without."""
        async with self._change_condition:
            try:
                await asyncio.wait_for(
                    self._change_condition.wait_for(
                        lambda: self._last_stopped_fit >= fit
                    ),
                    _STOP_POLL_SECONDS,
                )
            except asyncio.TimeoutError:
                return False
            return True

    def list_nodes(self) -> list[ClusterNode]:
        """List the cluster's nodes as its head sees them."""
        return list_nodes()

    def request_workers(
        self, allocation: Allocation, num_workers: int, worker_node_ids: Sequence[str]
    ) -> None:
        """Ask the autoscaler for workers: see `ray_cluster.request_workers`."""
        request_workers(allocation, num_workers, list_nodes(), worker_node_ids)

    def get_env(self, name: str) -> str | None:
        """Return an environment variable of the head, or None if it is not set."""
        return os.environ.get(name)


def create_mailbox() -> Any:
    """Start the mailbox on the head, which outlives the nodes of all workers."""
    mailbox_class = ray.remote(
        num_cpus=0,
        resources={HEAD_NODE_RESOURCE: 0.001},
        max_restarts=-1,
        max_task_retries=-1,
    )(Mailbox)
    return mailbox_class.options(name=make_mailbox_name()).remote()
