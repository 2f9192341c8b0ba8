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

_LEAVES, _LOST = 0, 1
_LONGER_THAN_A_RUN = timedelta(days=3650)


class PeerWatch:
    """A ring in which each rank waits for a message from the rank before it, which comes when that one leaves.

    A connection that closes without the message means that the rank is gone. The news travels on along the ring.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        rank: int,
        ranks: int,
        on_loss: Callable[[], None],
    ) -> None:
        """Start to watch.

        Args:
            group: a gloo group of all ranks, of which nobody else makes use.
            rank: this one, 0 to ranks - 1.
            ranks: how many there are, at least 2.
            on_loss: called once if a rank is lost, on a thread of the watch, or if this one gives up.
        """
        self._group, self._before, self._next = (
            group,
            (rank - 1) % ranks,
            (rank + 1) % ranks,
        )
        self._on_loss = on_loss
        self._lock, self._said = threading.Lock(), False
        self._thread = threading.Thread(
            target=self._watch, name="distrain-peers", daemon=True
        )
        self._thread.start()

    def leave(self, *, lost: bool, timeout: float) -> None:
        """Tell the next rank that this one leaves, and wait until the one before leaves too.

        Args:
            lost: this rank gives up, and so should all.
            timeout: seconds to wait.
        """
        if lost:
            self._lose()
        elif self._is_first_word():
            self._send(_LEAVES)
            self._thread.join(timeout)

    def _watch(self) -> None:
        word = torch.tensor([_LOST])
        with suppress(
            RuntimeError
        ):  # the connection is closed: the word stays what it is
            work = dist.irecv(word, self._before, group=self._group)
            assert work is not None
            work.wait(
                _LONGER_THAN_A_RUN
            )  # the group's own time-out is for ranks that are expected
        if int(word) == _LOST:
            self._lose()

    def _lose(self) -> None:
        if self._is_first_word():
            self._on_loss()  # before the news: a send may wait for a host that is cut off
            self._send(_LOST)

    def _is_first_word(self) -> bool:
        """Whether this rank has said nothing to the next one before: it says one word."""
        with self._lock:
            first, self._said = not self._said, True
        return first

    def _send(self, word: int) -> None:
        with suppress(RuntimeError):  # it is the next rank that is gone
            dist.send(torch.tensor([word]), self._next, group=self._group)
