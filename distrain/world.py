"""What a process has to know of the others and of its hardware: rank, device, numerics, lanes."""

import os
import platform
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

import torch

from distrain.config import Config
from distrain.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """A rank among `ranks`, and the device it computes on."""

    device: torch.device
    rank: int = 0
    ranks: int = 1
    stop: threading.Event = field(default_factory=threading.Event)
    """Set from outside to end the run at the next step, with a checkpoint."""

    def hosted(self, virtual_workers: int) -> range:
        """The virtual workers that this rank computes: floor or ceil of V / ranks of them, one after another."""
        first, last = (i * virtual_workers // self.ranks for i in (self.rank, self.rank + 1))
        return range(first, last)


def local_world(config: Config) -> World:
    """A world of one process, on a GPU where there is one.

    Raises:
        UserError: the config asks for a GPU and there is none, or for arithmetic that the device lacks.
    """
    gpu = torch.cuda.is_available()
    if config.device == "cuda" and not gpu:
        raise UserError("device is cuda, but torch finds no GPU here: use device=auto or device=cpu")
    device = torch.device("cuda", 0) if gpu and config.device != "cpu" else torch.device("cpu")
    if config.precision == "tf32" and device.type == "cpu":
        raise UserError("precision tf32 exists on NVIDIA GPUs only: use precision=fp32 or bf16 here")
    return World(device)


@contextmanager
def numerics(config: Config, device: torch.device) -> Iterator[None]:
    """Set torch's global numerics for the run, and set them back after it."""
    exact, tf32 = config.reduction.mode == "exact", config.precision == "tf32"
    if exact:  # read by cuBLAS when it starts; another value, or none, gives other kernels
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    benchmark, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    torch.use_deterministic_algorithms(exact)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not exact and device.type == "cuda"
    # Lanes use the cores. A team of OpenMP threads on this one would spin between its uses and take the cores away
    # from them: measured, that made a run beside another job three times slower.
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
        torch.backends.cudnn.benchmark = benchmark
        torch.set_num_threads(threads)


class Lanes:
    """Computes several virtual workers side by side, each on a thread with its own `threads` CPU threads.

    A gradient differs between one and two CPU threads, so a virtual worker never shares its work; two lanes of one
    thread are also faster than one of two. On a GPU one lane runs on the calling thread.
    """

    def __init__(self, lanes: int, threads: int, device: torch.device) -> None:
        self.lanes = lanes
        inline = device.type == "cuda" and lanes == 1
        self._pool = None if inline else ThreadPoolExecutor(lanes, "lane", torch.set_num_threads, (threads,))

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
            errors = [error for future in futures if (error := future.exception()) is not None]
        except BaseException:  # interrupted: the lanes must not go on by themselves
            failed.set()
            raise
        if errors:
            raise errors[0]


def lanes_for(config: Config, world: World) -> int:
    """How many virtual workers a rank computes side by side."""
    default = 1 if world.device.type == "cuda" else cores()
    return max(1, min(config.lanes or default, len(world.hosted(config.virtual_workers))))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(device: torch.device) -> dict[str, str]:
    """Hardware and versions that may change a result's bits."""
    packages = ("distrain", "torch", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "pillow")
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        **found,
        "device": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "CPU")
    except OSError:
        return platform.processor() or platform.machine()
