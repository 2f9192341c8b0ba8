"""What a rank has to know of the others and of its hardware: collectives, device, numerics."""

import json
import os
import platform
import re
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distrain.config import Config
from distrain.errors import AttemptError, LostRankError, RunError, UserError


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class World:
    """A rank among `ranks`, and the device it computes on.

    What ranks decide together they decide from integers that were added up over all of them. Every collective raises
    LostRankError where another rank is gone.
    """

    device: torch.device
    rank: int = 0
    ranks: int = 1
    cores: int = field(default_factory=cores)
    """CPU cores of this rank."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set from outside, on any rank, to end the run at the next step, with a checkpoint."""
    session: str = field(default_factory=lambda: secrets.token_hex(8))
    """Names the launch: attempts of one launch follow each other without waiting."""
    address: str = "127.0.0.1"
    """This host's, that others can reach."""
    saved: Callable[[int, str | None], None] = lambda step, name: None
    """Called on all ranks with the step of a checkpoint that is whole; the lead knows its name too."""

    @property
    def lead(self) -> bool:
        """Whether this is the rank that tells and writes."""
        return self.rank == 0

    def hosted(self, virtual_workers: int) -> range:
        """The virtual workers that this rank computes: floor or ceil of V / ranks of them, one after another."""
        first, last = (i * virtual_workers // self.ranks for i in (self.rank, self.rank + 1))
        return range(first, last)

    def add_up(self, tensor: Tensor) -> Callable[[], None]:
        """Start to add a tensor up over all ranks, in place; call what is returned to wait for it."""
        if self.ranks == 1:
            return lambda: None
        with _losing_ranks():
            work = dist.all_reduce(tensor, async_op=True)

        def wait() -> None:
            with _losing_ranks():
                work.wait()

        return wait

    def totals(self, numbers: Sequence[int]) -> list[int]:
        """Integers added up over all ranks."""
        tensor = torch.tensor(numbers, dtype=torch.int64)
        self.add_up(tensor)()
        found: list[int] = tensor.tolist()
        return found

    def copy_from_lead(self, tensor: Tensor) -> None:
        """Overwrite a tensor with the lead's."""
        if self.ranks > 1:
            with _losing_ranks():
                dist.broadcast(tensor, 0)

    def gather(self, value: Any) -> list[Any]:
        """What each rank passed, a tree of plain values, by rank and on all ranks."""
        if self.ranks == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.ranks)]
        with _losing_ranks():
            dist.all_gather(sizes, torch.tensor([len(data)]))
            longest = max(int(size) for size in sizes)
            padded = torch.cat([data, data.new_zeros(longest - len(data))])
            parts = [torch.zeros_like(padded) for _ in sizes]
            dist.all_gather(parts, padded)
        return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]

    def settle(self) -> None:
        """Wait until this rank's device has done what it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails on all ranks, with the same sentence, if it fails for a reason to be told on one.

        Raises:
            UserError or RunError: that of the lowest rank which raised one.
        """
        own: UserError | RunError | None = None
        try:
            yield
        except LostRankError:
            raise
        except (UserError, RunError) as error:
            own = error
        if self.ranks == 1:
            if own is not None:
                raise own
            return
        for problem in self.gather(own and [type(own).__name__, str(own)]):
            if problem is not None:
                kind, text = problem
                raise {"UserError": UserError, "RunError": RunError}.get(kind, AttemptError)(text) from own


@contextmanager
def _losing_ranks() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # all of torch.distributed's errors are
        raise LostRankError(f"another rank is gone or silent: {_without_place(str(error))}") from error


def _without_place(text: str) -> str:
    """The first sentence of an error of torch.distributed's, without the source line that it begins with."""
    return re.sub(r"^\[[^]]*\] *", "", text.splitlines()[0]).split(". ")[0]


@contextmanager
def joined(
    device: torch.device,
    rank: int,
    ranks: int,
    meet: Callable[[str], str],
    *,
    address: str = "127.0.0.1",
    timeout: float,
    cores: int,
    session: str,
    saved: Callable[[int, str | None], None] = lambda step, name: None,
) -> Iterator[World]:
    """A world of several processes, whose process group ends with the block.

    Args:
        device: what this rank computes on.
        rank: 0 to ranks - 1.
        ranks: how many there are.
        meet: returns to every rank what rank 0 passed to it.
        address: this host's, that the other ranks can reach.
        timeout: seconds after which a rank that does not come to a collective counts as lost.
        cores: CPU cores that this rank may use.
        session, saved: as in World.

    Raises:
        LostRankError: the ranks cannot reach each other.
    """
    limit = timedelta(seconds=timeout)
    world = World(device, rank, ranks, cores, session=session, address=address, saved=saved)
    if ranks == 1:
        yield world
        return
    name = interface(address)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if name is not None:  # or gloo takes the address of the host's name, which may be 127.0.1.1
            os.environ.setdefault(variable, name)
    with _losing_ranks():
        # Rank 0 listens on a port that the system picks, so none can be taken.
        listening = (address, 0, ranks, True, limit, False)
        store = dist.TCPStore(*listening) if rank == 0 else None  # type: ignore[attr-defined]
        host, _, port = meet(f"{address} {store.port}" if store else "").partition(" ")
        store = store or dist.TCPStore(host, int(port), ranks, False, limit)  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=limit)
    try:
        yield world
    finally:
        with suppress(RuntimeError):  # what broke it was raised already
            dist.destroy_process_group()


def interface(address: str) -> str | None:
    """The network interface of this host that has an IPv4 address; None where that cannot be found out."""
    if not hasattr(socket, "if_nameindex"):
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                request = name.encode()[:15].ljust(256, b"\0")
                found = fcntl.ioctl(probe.fileno(), 0x8915, request)[20:24]  # SIOCGIFADDR
                if socket.inet_ntoa(found) == address:
                    return name
    return None


def local_world(config: Config) -> World:
    """A world of one process, on a GPU where there is one.

    Raises:
        UserError: the config asks for a GPU and there is none.
    """
    gpu = torch.cuda.is_available()
    if config.device == "cuda" and not gpu:
        raise UserError("device is cuda, but torch finds no GPU here: use device=auto or device=cpu")
    return World(torch.device("cuda", 0) if gpu and config.device != "cpu" else torch.device("cpu"))


@contextmanager
def numerics(config: Config, device: torch.device) -> Iterator[None]:
    """Set torch's global numerics for the run, and set them back after it.

    Raises:
        UserError: the config asks for arithmetic that the device lacks.
    """
    if config.precision == "tf32" and device.type == "cpu":
        raise UserError("precision tf32 exists on NVIDIA GPUs only: use precision=fp32 or bf16 here")
    exact, tf32 = config.reduction.mode == "exact", config.precision == "tf32"
    if exact:  # read by cuBLAS when it starts; another value, or none, gives other kernels
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"  # read by torch's compiler when a model loads it
    deterministic = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    benchmark, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    _be_deterministic(2 if exact else 0)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not exact and device.type == "cuda"
    # Lanes use the cores. A team of OpenMP threads on this one would spin between its uses and take the cores away
    # from them: measured, that made a run beside another job three times slower.
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _be_deterministic(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
        torch.backends.cudnn.benchmark = benchmark
        torch.set_num_threads(threads)


def _be_deterministic(mode: int) -> None:
    """Set torch's deterministic mode: 0 off, 1 warn, 2 refuse what is not.

    Where torch's compiler is not loaded its flag is not set, since that would load it, which takes a second and more.
    """
    if "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
    else:
        torch.set_deterministic_debug_mode(mode)


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
    # Measured: each of these changes the bits of a gradient.
    settings = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ATEN_CPU_CAPABILITY")
    return {
        "python": platform.python_version(),
        **found,
        **{name: os.environ[name] for name in settings if name in os.environ},
        "device": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "CPU")
    except OSError:
        return platform.processor() or platform.machine()
