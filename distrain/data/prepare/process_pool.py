"""Run work on the blocks of a source in processes; results come in order of the tasks.

Processes and not threads, since decoding holds the GIL for a quarter of its time. Each
process reads ahead of what it decodes, so that a distant store does not leave it idle.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from typing import Any, TypeVar
from urllib.parse import urlsplit

from distrain.data.prepare.source import Block, BlockReader, BlockRows
from distrain.distributed.process import keep_freed_memory
from distrain.errors import RunError, UserError

_BLAS_THREADS_VARIABLE = "OPENBLAS_NUM_THREADS"
_PREFETCH_BLOCKS = 8
_MAX_TASK_ROWS = 32
_MAX_TASK_BYTES = 16 << 20
# Tasks in flight per process: one that it works on, one that waits.
_TASKS_PER_PROCESS = 2
_T = TypeVar("_T")
_R = TypeVar("_R")


@contextmanager
def open_process_pool(
    num_processes: int, reader: BlockReader, url: str
) -> Iterator["ProcessPool"]:
    """Start a pool whose processes have the reader, and stop it on leaving the context.

    With `num_processes` 1, work runs in this process.
    """
    # A started process imports the main script, which must not call this again. The
    # process that started this one says so.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)
    # A memory:// store exists in this process only.
    if num_processes == 1 or urlsplit(url).scheme == "memory":
        keep_freed_memory()
        yield ProcessPool(None, 1, reader)
        return

    # Each process already has a core for itself, so the threads that BLAS would start
    # in it could only spin. Set in the parent, since numpy reads it on import.
    previous_threads = os.environ.get(_BLAS_THREADS_VARIABLE)
    os.environ[_BLAS_THREADS_VARIABLE] = "1"
    context = multiprocessing.get_context("spawn")
    has_imported = context.Event()
    executor = ProcessPoolExecutor(
        num_processes, context, _init_process, (reader, has_imported)
    )
    try:
        yield ProcessPool(executor, num_processes, reader, has_imported)
    finally:
        executor.shutdown(cancel_futures=True)
        if previous_threads is None:
            del os.environ[_BLAS_THREADS_VARIABLE]
        else:
            os.environ[_BLAS_THREADS_VARIABLE] = previous_threads


class ProcessPool:
    """Pool that runs functions of (reader, task)."""

    def __init__(
        self,
        executor: ProcessPoolExecutor | None,
        num_processes: int,
        reader: BlockReader,
        has_imported: Event | None = None,
    ) -> None:
        """Wrap an executor; `has_imported` is set once a process runs its tasks."""
        self._has_imported = has_imported
        self._executor = executor
        self._max_in_flight = _TASKS_PER_PROCESS * num_processes + 1
        self._reader = reader

    def map_tasks(
        self, function: Callable[[BlockReader, _T], _R], tasks: Iterable[_T]
    ) -> Iterator[tuple[_T, _R]]:
        """Yield each task with the function's result, in the order of tasks.

        Only a few tasks are in flight at once.

        Raises:
            UserError: no process could import the main script.
            RunError: a process was killed.
        """
        if self._executor is None:
            for task in tasks:
                yield task, function(self._reader, task)
            return
        in_flight: deque[tuple[_T, Future[_R]]] = deque()
        try:
            # Submit ahead, but bounded: a result waits in memory until it is yielded.
            for task in tasks:
                in_flight.append((task, self._submit_task(function, task)))
                if len(in_flight) > self._max_in_flight:
                    oldest_task, future = in_flight.popleft()
                    yield oldest_task, future.result()
            while in_flight:
                oldest_task, future = in_flight.popleft()
                yield oldest_task, future.result()
        except BrokenProcessPool:
            if self._has_imported is not None and not self._has_imported.is_set():
                raise UserError(
                    "the processes that pack, index and stats start could not import "
                    'this script: call them below `if __name__ == "__main__":`, or '
                    "with processes=1"
                ) from None
            raise RunError(
                "a process that decodes images ended early: if it was killed for lack "
                "of memory, run again with fewer processes (a pack resumes from its "
                "finished shards)"
            ) from None

    def _submit_task(
        self, function: Callable[[BlockReader, _T], _R], task: _T
    ) -> Future[_R]:
        """Submit a task, which may start a process for it."""
        assert self._executor is not None
        # Ctrl-C is for the parent alone. A new process inherits the signal mask, so it
        # is protected from its first instruction on, also while it still imports.
        previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._executor.submit(_run_task, function, task)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


# The reader of a pool's process; empty in the parent.
_process_readers: list[BlockReader] = []


def _init_process(reader: BlockReader, has_imported: Event) -> None:
    _process_readers.append(reader)
    has_imported.set()
    keep_freed_memory()
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent_sentinel = parent.sentinel

    # A pool's process waits forever for tasks if its parent is killed.
    def exit_with_parent() -> None:
        wait([parent_sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _run_task(function: Callable[[BlockReader, Any], Any], task: Any) -> Any:
    return function(_process_readers[0], task)


def group_into_tasks(
    items: Iterable[_T], count_rows_and_bytes: Callable[[_T], tuple[int, int]]
) -> Iterator[list[_T]]:
    """Group consecutive items into tasks of at most 32 rows and 16 MiB, or of one item.

    Args:
        items: what to group.
        count_rows_and_bytes: returns the rows and the bytes of an item.
    """
    group: list[_T] = []
    num_rows = 0
    num_bytes = 0
    for item in items:
        item_rows, item_bytes = count_rows_and_bytes(item)
        is_full = (
            num_rows + item_rows > _MAX_TASK_ROWS
            or num_bytes + item_bytes > _MAX_TASK_BYTES
        )
        if group and is_full:
            yield group
            group = []
            num_rows = 0
            num_bytes = 0
        group.append(item)
        num_rows += item_rows
        num_bytes += item_bytes
    if group:
        yield group


def prefetch_blocks(
    reader: BlockReader, blocks: Sequence[Block]
) -> Iterator[tuple[Block, BlockRows]]:
    """Yield each block with its rows, read ahead by a few threads."""
    with ThreadPoolExecutor(_PREFETCH_BLOCKS) as pool:
        reads: deque[Future[BlockRows]] = deque()
        for i, block in enumerate(blocks):
            # Keep the reads of this block and of the next seven in flight.
            while len(reads) < _PREFETCH_BLOCKS and i + len(reads) < len(blocks):
                reads.append(pool.submit(reader.read_block, blocks[i + len(reads)]))
            yield block, reads.popleft().result()
