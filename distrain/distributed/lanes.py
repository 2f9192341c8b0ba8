"""Virtual workers side by side: the threads of a rank that compute them."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from distrain.distributed.world import World

T = TypeVar("T")


class Lanes:
    """Computes several virtual workers side by side, each on a thread with its own `threads` CPU threads.

    A gradient differs between one and two CPU threads, so a virtual worker never shares its work; two lanes of one
    thread are also faster than one of two. On a GPU one lane runs on the calling thread.
    """

    def __init__(self, lanes: int, threads: int, device: torch.device) -> None:
        self.lanes = lanes
        inline = device.type == "cuda" and lanes == 1
        self._pool = (
            None
            if inline
            else ThreadPoolExecutor(lanes, "lane", _prepare, (threads, device))
        )

    def __enter__(self) -> "Lanes":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, work: Callable[[T], None], items: Iterable[T]) -> None:
        """Call `work` on each item; items are taken one by one. Raises the first error, after all lanes stopped."""
        source, lock, failed = iter(items), threading.Lock(), threading.Event()

        def lane() -> None:
            while not failed.is_set():
                with lock:
                    try:
                        item = next(source)
                    except StopIteration:
                        return
                work(item)

        def guarded() -> None:
            try:
                lane()
            except BaseException:
                failed.set()
                raise

        if self._pool is None:
            lane()
            return
        futures = [self._pool.submit(guarded) for _ in range(self.lanes)]
        try:
            errors = [
                error for future in futures if (error := future.exception()) is not None
            ]
        except BaseException:  # interrupted: the lanes must not go on by themselves
            failed.set()
            raise
        if errors:
            raise errors[0]


def _prepare(threads: int, device: torch.device) -> None:
    """Set what torch keeps for each thread: the number of CPU threads, and the GPU."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def lanes_for(world: World, virtual_workers: int, lanes: int | None) -> int:
    """Count the virtual workers that a rank computes side by side: `lanes`, or one per core, or 1 on a GPU."""
    default = 1 if world.device.type == "cuda" else world.cores
    return max(1, min(lanes or default, len(world.hosted(virtual_workers))))
