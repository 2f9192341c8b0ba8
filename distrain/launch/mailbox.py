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

from distrain.launch.ray_cluster import call_for, look
from distrain.launch.share import Node, Share

_DRIVER = "distrain-driver"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def name_of_driver() -> str:
    """Return a mailbox's name for a run that this process drives."""
    return f"{_DRIVER} {_processes_here()} {os.getpid()} {secrets.token_hex(4)}"


def drivers_here() -> list[int]:
    """Return the ids of processes that drive runs on the cluster and can be signalled from here."""
    names = (
        found["name"].split(" ") for found in list_named_actors(all_namespaces=True)
    )
    return sorted(
        int(name[2]) for name in names if name[:2] == [_DRIVER, _processes_here()]
    )


def _processes_here() -> str:
    """Identify the space of process ids here: the machine since its boot, and the PID namespace."""
    try:
        container = os.readlink("/proc/self/ns/pid")
        return f"{_BOOT.read_text().strip()}:{container}"
    except OSError:  # not Linux: nobody is found
        return secrets.token_hex(16)


class Mailbox:
    """An actor between the driver and the ranks: lines for the console one way, the wish to stop the other way."""

    def __init__(self) -> None:
        self._mail: list[tuple[str, Any]] = []
        self._stopped_fit = 0
        self._changed = asyncio.Condition()

    async def put(self, kind: str, value: Any) -> None:
        """Tell the driver."""
        async with self._changed:
            self._mail.append((kind, value))
            self._changed.notify_all()

    async def take(self, wait: float) -> list[tuple[str, Any]]:
        """Return the messages since the last call; wait at most `wait` seconds for the first."""
        async with self._changed:
            if not self._mail:
                try:
                    await asyncio.wait_for(
                        self._changed.wait_for(lambda: self._mail), wait
                    )
                except asyncio.TimeoutError:
                    return []
            mail, self._mail = self._mail, []
            return mail

    async def stop(self, fit: int) -> None:
        """Ask the ranks of a fit to save and end."""
        async with self._changed:
            self._stopped_fit = fit
            self._changed.notify_all()

    async def stopped(self, fit: int) -> bool:
        """Return when the ranks of a fit are asked to end; False after a while without."""
        async with self._changed:
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self._stopped_fit >= fit), 60.0
                )
            except asyncio.TimeoutError:
                return False
            return True

    def look(self) -> list[Node]:
        """The cluster as it is seen from its head."""
        return look()

    def call_for(self, share: Share, workers: int, held: Sequence[str]) -> None:
        """Ask the autoscaler for room."""
        call_for(share, workers, look(), held)

    def variable(self, name: str) -> str | None:
        """An environment variable of the head."""
        return os.environ.get(name)
