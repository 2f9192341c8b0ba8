"""Notices on every rank, at once, that another rank is gone, while the GPUs reduce.

A lost peer ends a gloo collective within a fraction of a second. A collective of NCCL it leaves waiting on the GPU, and
with it the host, as soon as that waits for the device. So a thread of each rank waits for a gloo message beside it.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

_STATUS_LEAVING, _STATUS_LOST = 0, 1
_NO_TIMEOUT = timedelta(days=3650)


class PeerMonitor:
    """A ring in which each rank waits for a message from the rank before it, which comes when that one leaves.

    A connection that closes without the message means that the rank is gone. The news travels on along the ring.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        rank: int,
        world_size: int,
        on_peer_lost: Callable[[], None],
    ) -> None:
        """Start to watch.

        Args:
            group: a gloo group of all ranks, of which nobody else makes use.
            rank: this one, 0 to ranks - 1.
            ranks: how many there are, at least 2.
            on_loss: called once if a rank is lost, on a thread of the watch, or if this one gives up.
        """
        self._group, self._previous_rank, self._next_rank = (
            group,
            (rank - 1) % world_size,
            (rank + 1) % world_size,
        )
        self._on_peer_lost = on_peer_lost
        self._lock, self._has_notified = threading.Lock(), False
        self._thread = threading.Thread(
            target=self._wait_for_message, name="distrain-peers", daemon=True
        )
        self._thread.start()

    def leave_ring(self, *, failed: bool, timeout: float) -> None:
        """Tell the next rank that this one leaves, and wait until the one before leaves too.

        Args:
            lost: this rank gives up, and so should all.
            timeout: seconds to wait.
        """
        if failed:
            self._declare_lost()
        elif self._claim_notification():
            self._send_status(_STATUS_LEAVING)
            self._thread.join(timeout)

    def _wait_for_message(self) -> None:
        word = torch.tensor([_STATUS_LOST])
        with suppress(
            RuntimeError
        ):  # the connection is closed: the word stays what it is
            work = dist.irecv(word, self._previous_rank, group=self._group)
            assert work is not None
            work.wait(
                _NO_TIMEOUT
            )  # the group's own time-out is for ranks that are expected
        if int(word) == _STATUS_LOST:
            self._declare_lost()

    def _declare_lost(self) -> None:
        if self._claim_notification():
            self._on_peer_lost()  # before the news: a send may wait for a host that is cut off
            self._send_status(_STATUS_LOST)

    def _claim_notification(self) -> bool:
        """Whether this rank has said nothing to the next one before: it says one word."""
        with self._lock:
            first, self._has_notified = not self._has_notified, True
        return first

    def _send_status(self, status: int) -> None:
        with suppress(RuntimeError):  # it is the next rank that is gone
            dist.send(torch.tensor([status]), self._next_rank, group=self._group)
