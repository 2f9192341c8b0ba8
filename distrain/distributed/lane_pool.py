"""Lanes: the threads of a rank that compute virtual workers side by side."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from distrain.distributed.world import World

T = TypeVar("T")


class LanePool:
    """Pool of lanes; each lane is a thread with `threads_per_lane` CPU threads.

    A gradient's bits depend on the number of CPU threads (one or two), so a virtual
    worker is never split over lanes; two lanes of one thread are also faster than one
    lane of two. On a GPU, a single lane runs on the calling thread.
    """

    def __init__(
        self, num_lanes: int, threads_per_lane: int, device: torch.device
    ) -> None:
        self.num_lanes = num_lanes
        self._executor: ThreadPoolExecutor | None = None
        runs_inline = device.type == "cuda" and num_lanes == 1
        if not runs_inline:
            self._executor = ThreadPoolExecutor(
                num_lanes, "lane", _initialize_thread, (threads_per_lane, device)
            )

    def __enter__(self) -> "LanePool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def for_each(self, work: Callable[[T], None], items: Iterable[T]) -> None:
        """Call `work` on each item; every lane takes the next item when it is free.

        Raises the first error, after all lanes have stopped.
        """
        source = iter(items)
        # An iterator may not be advanced by two threads at once.
        lock = threading.Lock()
        failed = threading.Event()

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
                # Stop the other lanes at their next item.
                failed.set()
                raise

        if self._executor is None:
            run_lane()
            return

        # Run one loop per lane, and wait for all of them.
        futures = [
            self._executor.submit(run_guarded_lane) for _ in range(self.num_lanes)
        ]
        try:
            exceptions = [future.exception() for future in futures]
        except BaseException:
            # Interrupted while waiting: without this the lanes would keep computing.
            failed.set()
            raise
        for error in exceptions:
            if error is not None:
                raise error


def _initialize_thread(num_threads: int, device: torch.device) -> None:
    """Set torch's per-thread state: the number of CPU threads, and the GPU."""
    torch.set_num_threads(num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def count_lanes(world: World, num_virtual_workers: int, num_lanes: int | None) -> int:
    """Return how many virtual workers a rank computes side by side.

    Args:
        world: this rank.
        num_virtual_workers: V, of the whole run.
        num_lanes: the number asked for; None: one per core, or 1 on a GPU.

    Returns:
        At least 1, at most the virtual workers of this rank.
    """
    default = 1 if world.device.type == "cuda" else world.num_cores
    num_local = len(world.local_virtual_workers(num_virtual_workers))
    return max(1, min(num_lanes or default, num_local))
