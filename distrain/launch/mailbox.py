"""The mailbox between ranks and driver. It does not load torch, whose import the start of every run would wait for.

Its name in Ray says which process drives the run, for `distrain drain`.
"""

import asyncio
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.util import list_named_actors

from distrain.launch.allocation import Allocation, ClusterNode
from distrain.launch.ray_cluster import list_nodes, request_workers

_DRIVER_NAME_PREFIX = "distrain-driver"
_BOOT_ID_PATH = Path("/proc/sys/kernel/random/boot_id")


def make_mailbox_name() -> str:
    """Return a mailbox's name for a run that this process drives."""
    return f"{_DRIVER_NAME_PREFIX} {_identify_pid_namespace()} {os.getpid()} {secrets.token_hex(4)}"


def list_local_drivers() -> list[int]:
    """Return the ids of processes that drive runs on the cluster and can be signalled from here."""
    names = (
        found["name"].split(" ") for found in list_named_actors(all_namespaces=True)
    )
    return sorted(
        int(name[2])
        for name in names
        if name[:2] == [_DRIVER_NAME_PREFIX, _identify_pid_namespace()]
    )


def _identify_pid_namespace() -> str:
    """Identify the space of process ids here: the machine since its boot, and the PID namespace."""
    try:
        container = os.readlink("/proc/self/ns/pid")
        return f"{_BOOT_ID_PATH.read_text().strip()}:{container}"
    except OSError:  # not Linux: nobody is found
        return secrets.token_hex(16)


class Mailbox:
    """An actor between the driver and the ranks: lines for the console one way, the wish to stop the other way."""

    def __init__(self) -> None:
        self._messages: list[tuple[str, Any]] = []
        self._last_stopped_fit = 0
        self._change_condition = asyncio.Condition()

    async def send_message(self, kind: str, value: Any) -> None:
        """Tell the driver."""
        async with self._change_condition:
            self._messages.append((kind, value))
            self._change_condition.notify_all()

    async def receive_messages(self, timeout_seconds: float) -> list[tuple[str, Any]]:
        """Return the messages since the last call; wait at most `wait` seconds for the first."""
        async with self._change_condition:
            if not self._messages:
                try:
                    await asyncio.wait_for(
                        self._change_condition.wait_for(lambda: self._messages),
                        timeout_seconds,
                    )
                except asyncio.TimeoutError:
                    return []
            mail, self._messages = self._messages, []
            return mail

    async def request_stop(self, fit: int) -> None:
        """Ask the ranks of a fit to save and end."""
        async with self._change_condition:
            self._last_stopped_fit = fit
            self._change_condition.notify_all()

    async def wait_for_stop(self, fit: int) -> bool:
        """Return when the ranks of a fit are asked to end; False after a while without."""
        async with self._change_condition:
            try:
                await asyncio.wait_for(
                    self._change_condition.wait_for(
                        lambda: self._last_stopped_fit >= fit
                    ),
                    60.0,
                )
            except asyncio.TimeoutError:
                return False
            return True

    def list_nodes(self) -> list[ClusterNode]:
        """The cluster as it is seen from its head."""
        return list_nodes()

    def request_workers(
        self, allocation: Allocation, num_workers: int, worker_node_ids: Sequence[str]
    ) -> None:
        """Ask the autoscaler for room."""
        request_workers(allocation, num_workers, list_nodes(), worker_node_ids)

    def get_env(self, name: str) -> str | None:
        """An environment variable of the head."""
        return os.environ.get(name)
