"""Monitor that notices a lost rank at once, while the GPUs all-reduce.

When a peer is lost, a gloo collective fails within a fraction of a second. An NCCL
collective keeps waiting on the GPU, and blocks the host as soon as the host waits for
the device. So a thread of each rank waits for a gloo message beside the collective.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

_STATUS_LEAVING = 0
_STATUS_LOST = 1
_NO_TIMEOUT = timedelta(days=3650)


class PeerMonitor:
    """Ring in which each rank waits for a message from the previous rank.

    A rank sends its message when it leaves. If the connection closes without one, the
    previous rank is lost. That news is passed on along the ring.
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
            group: a gloo group of all ranks, used by nothing else.
            rank: this rank, 0 to world_size - 1.
            world_size: number of ranks, at least 2.
            on_peer_lost: called once if a rank is lost, on the monitor's thread, or if
                this rank fails.
        """
        self._group = group
        self._previous_rank = (rank - 1) % world_size
        self._next_rank = (rank + 1) % world_size
        self._on_peer_lost = on_peer_lost
        self._lock = threading.Lock()
        self._has_notified = False
        self._thread = threading.Thread(
            target=self._wait_for_message, name="distrain-peers", daemon=True
        )
        self._thread.start()

    def leave_ring(self, *, failed: bool, timeout: float) -> None:
        """Announce to the next rank that this one leaves; wait for the previous rank.

        Args:
            failed: this rank failed, so all others should stop too; do not wait.
            timeout: seconds to wait for the previous rank to leave.
        """
        if failed:
            self._declare_lost()
        elif self._claim_notification():
            self._send_status(_STATUS_LEAVING)
            self._thread.join(timeout)

    def _wait_for_message(self) -> None:
        status = torch.tensor([_STATUS_LOST])
        # A closed connection raises: the status then stays "lost".
        with suppress(RuntimeError):
            work = dist.irecv(status, self._previous_rank, group=self._group)
            assert work is not None
            # The group's own timeout is for ranks that should answer soon. This message
            # comes at the end of the run.
            work.wait(_NO_TIMEOUT)
        if int(status) == _STATUS_LOST:
            self._declare_lost()

    def _declare_lost(self) -> None:
        if self._claim_notification():
            # Before the message: sending may block if the next rank's host is cut off.
            self._on_peer_lost()
            self._send_status(_STATUS_LOST)

    def _claim_notification(self) -> bool:
        """Return True to the first caller only: a rank sends one message in all."""
        with self._lock:
            is_first = not self._has_notified
            self._has_notified = True
        return is_first

    def _send_status(self, status: int) -> None:
        # An error means that the next rank is the lost one.
        with suppress(RuntimeError):
            dist.send(torch.tensor([status]), self._next_rank, group=self._group)
