"""Virtual workers side by side: the threads of a rank that compute them."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from distrain.distributed.world import World

T = TypeVar("T")


class LanePool:
    """Computes several virtual workers side by side, each on a thread with its own `threads` CPU threads.

    A gradient differs between one and two CPU threads, so a virtual worker never shares its work; two lanes of one
    thread are also faster than one of two. On a GPU one lane runs on the calling thread.
    """

    def __init__(
        self, num_lanes: int, threads_per_lane: int, device: torch.device
    ) -> None:
        self.num_lanes = num_lanes
        inline = device.type == "cuda" and num_lanes == 1
        self._executor = (
            None
            if inline
            else ThreadPoolExecutor(
                num_lanes, "lane", _initialize_thread, (threads_per_lane, device)
            )
        )

    def __enter__(self) -> "LanePool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def for_each(self, work: Callable[[T], None], items: Iterable[T]) -> None:
        """Call `work` on each item; items are taken one by one. Raises the first error, after all lanes stopped."""
        source, lock, failed = iter(items), threading.Lock(), threading.Event()

        def run_lane() -> None:
            while not failed.is_set():
                with lock:
                    try:
                        item = next(source)
                    except StopIteration:
                        return
                work(item)

        def run_guarded_lane() -> None:
            try:
                run_lane()
            except BaseException:
                failed.set()
                raise

        if self._executor is None:
            run_lane()
            return
        futures = [
            self._executor.submit(run_guarded_lane) for _ in range(self.num_lanes)
        ]
        try:
            errors = [
                error for future in futures if (error := future.exception()) is not None
            ]
        except BaseException:  # interrupted: the lanes must not go on by themselves
            failed.set()
            raise
        if errors:
            raise errors[0]


def _initialize_thread(num_threads: int, device: torch.device) -> None:
    """Set what torch keeps for each thread: the number of CPU threads, and the GPU."""
    torch.set_num_threads(num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def count_lanes(world: World, num_virtual_workers: int, num_lanes: int | None) -> int:
    """Count the virtual workers that a rank computes side by side: `lanes`, or one per core, or 1 on a GPU."""
    default = 1 if world.device.type == "cuda" else world.num_cores
    return max(
        1,
        min(
            num_lanes or default, len(world.local_virtual_workers(num_virtual_workers))
        ),
    )
