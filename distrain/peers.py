"""Notices on every rank, at once, that another rank is gone, while the GPUs reduce.

A lost peer ends a gloo collective within a fraction of a second. A collective of NCCL it leaves waiting on the GPU, and
with it the host, as soon as that waits for the device. So a thread of each rank waits for a gloo message beside it.
"""

import threading
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.distributed as dist

_LEAVES, _LOST = 0, 1


class PeerWatch:
    """A ring in which each rank waits for a message from the rank before it, which comes when that one leaves.

    A connection that closes without the message means that the rank is gone. The news travels on along the ring.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, ranks: int, on_loss: Callable[[], None]) -> None:
        """Start to watch.

        Args:
            group: a gloo group of all ranks, of which nobody else makes use, and whose time-out is longer than a run.
            rank: this one, 0 to ranks - 1.
            ranks: how many there are, at least 2.
            on_loss: called once if a rank is lost, on a thread of the watch, or if this one gives up.
        """
        self._group, self._before, self._next = group, (rank - 1) % ranks, (rank + 1) % ranks
        self._on_loss = on_loss
        self._lock, self._said = threading.Lock(), False
        self._thread = threading.Thread(target=self._watch, name="distrain-peers", daemon=True)
        self._thread.start()

    def leave(self, *, lost: bool, timeout: float) -> None:
        """Tell the next rank that this one leaves, and wait until the one before leaves too.

        Args:
            lost: this rank gives up, and so should all.
            timeout: seconds to wait.
        """
        if lost:
            self._lose()
            return
        self._say(_LEAVES)
        self._thread.join(timeout)

    def _watch(self) -> None:
        word = torch.tensor([_LOST])
        with suppress(RuntimeError):  # the connection is closed: the word stays what it is
            dist.recv(word, self._before, group=self._group)
        if int(word) == _LOST:
            self._lose()

    def _lose(self) -> None:
        if self._say(_LOST):
            self._on_loss()

    def _say(self, word: int) -> bool:
        """Send the one word that this rank says to the next; whether nothing was said before."""
        with self._lock:
            if self._said:
                return False
            self._said = True
        with suppress(RuntimeError):  # it is the next rank that is gone
            dist.send(torch.tensor([word]), self._next, group=self._group)
        return True
