"""Work on the blocks of a source, in processes, one for each core: what is done is handed back in its order.

Processes and not threads, since decoding in Python holds its interpreter for a quarter of the time. Each reads ahead of
what it decodes, so that a store that is far away does not leave it idle.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, TypeVar
from urllib.parse import urlsplit

from distrain.data.prepare.source import Block, BlockReader, BlockRows
from distrain.errors import RunError

_BLAS_THREADS_VARIABLE = "OPENBLAS_NUM_THREADS"
_PREFETCH_BLOCKS = 8
_MAX_TASK_ROWS, _MAX_TASK_BYTES = 32, 16 << 20
# Tasks in flight for each process: one that it works on, one that waits.
_TASKS_PER_PROCESS = 2
_T = TypeVar("_T")
_R = TypeVar("_R")


@contextmanager
def open_process_pool(
    num_processes: int, reader: BlockReader, url: str
) -> Iterator["ProcessPool"]:
    """Processes that have the reader; with a count of 1, or where only this process can see the source, this one."""
    if num_processes == 1 or urlsplit(url).scheme == "memory":
        yield ProcessPool(None, 1, reader)
        return
    before = os.environ.get(_BLAS_THREADS_VARIABLE)
    os.environ[_BLAS_THREADS_VARIABLE] = (
        "1"  # read when numpy is loaded: a team of threads in each process would only spin
    )
    pool = ProcessPoolExecutor(
        num_processes, multiprocessing.get_context("spawn"), _init_process, (reader,)
    )
    try:
        yield ProcessPool(pool, num_processes, reader)
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ[_BLAS_THREADS_VARIABLE]
        else:
            os.environ[_BLAS_THREADS_VARIABLE] = before


class ProcessPool:
    """Runs functions of (reader, task)."""

    def __init__(
        self,
        executor: ProcessPoolExecutor | None,
        num_processes: int,
        reader: BlockReader,
    ) -> None:
        self._executor, self._max_in_flight, self._reader = (
            executor,
            _TASKS_PER_PROCESS * num_processes + 1,
            reader,
        )

    def map_tasks(
        self, function: Callable[[BlockReader, _T], _R], tasks: Iterable[_T]
    ) -> Iterator[tuple[_T, _R]]:
        """Each task with what the function makes of it, in the order of tasks; few are in flight at once.

        Raises:
            RunError: a process was killed.
        """
        if self._executor is None:
            for task in tasks:
                yield task, function(self._reader, task)
            return
        flying: deque[tuple[_T, Future[_R]]] = deque()
        try:
            for task in tasks:
                flying.append((task, self._submit_task(function, task)))
                if len(flying) > self._max_in_flight:
                    task, future = flying.popleft()
                    yield task, future.result()
            while flying:
                task, future = flying.popleft()
                yield task, future.result()
        except BrokenProcessPool:
            raise RunError(
                "a process that decodes images was killed, perhaps for want of memory: run the same command to go on"
            ) from None

    def _submit_task(
        self, function: Callable[[BlockReader, _T], _R], task: _T
    ) -> Future[_R]:
        """Hand a task to a process, which may have to be started for it."""
        assert self._executor is not None
        # A process inherits what is blocked: a Ctrl-C is for the parent alone, also while the others still import.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._executor.submit(_run_task, function, task)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


_process_readers: list[BlockReader] = []


def _init_process(reader: BlockReader) -> None:
    _process_readers.append(reader)
    parent = multiprocessing.parent_process()
    assert parent is not None
    # The pool's own processes wait for ever where their parent is killed.
    threading.Thread(
        target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True
    ).start()


def _run_task(function: Callable[[BlockReader, Any], Any], task: Any) -> Any:
    return function(_process_readers[0], task)


def group_into_tasks(
    items: Iterable[_T], count_rows_and_bytes: Callable[[_T], tuple[int, int]]
) -> Iterator[list[_T]]:
    """Items as tasks, each of some dozens of rows and some megabytes, or one item; `weigh` says rows and bytes."""
    part, rows, size = list[_T](), 0, 0
    for item in items:
        more = count_rows_and_bytes(item)
        if part and (
            rows + more[0] > _MAX_TASK_ROWS or size + more[1] > _MAX_TASK_BYTES
        ):
            yield part
            part, rows, size = [], 0, 0
        part.append(item)
        rows += more[0]
        size += more[1]
    if part:
        yield part


def prefetch_blocks(
    reader: BlockReader, blocks: Sequence[Block]
) -> Iterator[tuple[Block, BlockRows]]:
    """The rows of blocks, read ahead."""
    with ThreadPoolExecutor(_PREFETCH_BLOCKS) as pool:
        coming: deque[Future[BlockRows]] = deque()
        for i, block in enumerate(blocks):
            while len(coming) < _PREFETCH_BLOCKS and i + len(coming) < len(blocks):
                coming.append(pool.submit(reader.read_block, blocks[i + len(coming)]))
            yield block, coming.popleft().result()
