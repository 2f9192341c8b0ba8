"""What a rank has to know of the others and of its device: collectives, cores."""

import json
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distrain.distributed.peer_monitor import PeerMonitor
from distrain.distributed.process import count_available_cores
from distrain.errors import AttemptError, LostRankError, RunError, UserError


@dataclass(frozen=True)
class World:
    """A rank among `ranks`, and the device it computes on.

    What ranks decide together they decide from integers that were added up over all of them. Every collective raises
    LostRankError where another rank is gone.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    num_cores: int = field(default_factory=count_available_cores)
    """CPU cores of this rank."""
    stop_requested: threading.Event = field(default_factory=threading.Event)
    """Set from outside, on any rank, to end the run at the next step, with a checkpoint."""
    session: str = field(default_factory=lambda: secrets.token_hex(8))
    """Names the launch: attempts of one launch follow each other without waiting."""
    node_address: str = "127.0.0.1"
    """This host's, that others can reach."""
    on_checkpoint: Callable[[int, str | None], None] = lambda step, name: None
    """Called on all ranks with the step of a checkpoint that is whole; the lead knows its name too."""
    desired_world_size: int = 1
    """Ranks that the run would like to have."""
    peer_lost: threading.Event = field(default_factory=threading.Event)
    """Set when another rank is gone, so that the collectives of this rank's GPU were aborted."""

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the rank that tells and writes."""
        return self.rank == 0

    def local_virtual_workers(self, num_virtual_workers: int) -> range:
        """The virtual workers that this rank computes: floor or ceil of V / ranks of them, one after another."""
        first, last = (
            i * num_virtual_workers // self.world_size
            for i in (self.rank, self.rank + 1)
        )
        return range(first, last)

    def all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        """Start to add a tensor up over all ranks, in place; call what is returned to wait for it."""
        if self.world_size == 1:
            return lambda: None
        with _translate_peer_errors():
            work = dist.all_reduce(tensor, async_op=True)

        def wait() -> None:
            with _translate_peer_errors():
                work.wait()

        return wait

    def all_reduce_ints(self, values: Sequence[int]) -> list[int]:
        """Integers added up over all ranks."""
        tensor = torch.tensor(values, dtype=torch.int64)
        self.all_reduce(tensor)()
        found: list[int] = tensor.tolist()
        return found

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite a tensor with the lead's."""
        if self.world_size > 1:
            with _translate_peer_errors():
                dist.broadcast(tensor, 0)

    def all_gather_object(self, value: Any) -> list[Any]:
        """What each rank passed, a tree of plain values, by rank and on all ranks."""
        if self.world_size == 1:
            return [value]
        data = torch.frombuffer(
            bytearray(json.dumps(value).encode()), dtype=torch.uint8
        )
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        with _translate_peer_errors():
            dist.all_gather(sizes, torch.tensor([len(data)]))
            longest = max(int(size) for size in sizes)
            padded = torch.cat([data, data.new_zeros(longest - len(data))])
            parts = [torch.zeros_like(padded) for _ in sizes]
            dist.all_gather(parts, padded)
        return [
            json.loads(bytes(part[: int(size)].tolist()))
            for part, size in zip(parts, sizes, strict=True)
        ]

    def synchronize(self) -> None:
        """Wait until this rank's device has done what it was asked.

        Raises:
            LostRankError: another rank is gone, so that what the device has reduced is void.
        """
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except (
            RuntimeError
        ) as error:  # a lost GPU's memory may be what the reduction was reading
            if self.peer_lost.is_set():
                raise LostRankError(
                    f"another rank is gone: {_strip_source_location(str(error))}"
                ) from error
            raise
        if self.peer_lost.is_set():
            raise LostRankError(
                "another rank is gone: the reduction on the GPU was aborted"
            )

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
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
        if self.world_size == 1:
            if own is not None:
                raise own
            return
        for problem in self.all_gather_object(own and [type(own).__name__, str(own)]):
            if problem is not None:
                kind, text = problem
                raise {"UserError": UserError, "RunError": RunError}.get(
                    kind, AttemptError
                )(text) from own


@contextmanager
def _translate_peer_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # all of torch.distributed's errors are
        raise LostRankError(
            f"another rank is gone or silent: {_strip_source_location(str(error))}"
        ) from error


def _strip_source_location(message: str) -> str:
    """The first sentence of an error of torch.distributed's, without the source line that it begins with."""
    return re.sub(r"^\[[^]]*\] *", "", message.splitlines()[0]).split(". ")[0]


@contextmanager
def open_process_group(
    device: torch.device,
    rank: int,
    world_size: int,
    broadcast_string: Callable[[str], str],
    *,
    node_address: str = "127.0.0.1",
    timeout: float,
    num_cores: int,
    session: str,
    on_checkpoint: Callable[[int, str | None], None] = lambda step, name: None,
    desired_world_size: int | None = None,
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
        wanted: ranks that the run would like to have; None: as many as there are.

    Raises:
        LostRankError: the ranks cannot reach each other.
    """
    limit = timedelta(seconds=timeout)
    about: dict[str, Any] = {
        "session": session,
        "node_address": node_address,
        "on_checkpoint": on_checkpoint,
        "desired_world_size": desired_world_size or world_size,
    }
    world = World(device, rank, world_size, num_cores, **about)
    if world_size == 1:
        yield world
        return
    watch, ended = None, False
    try:
        store = _connect_tcp_store(
            rank, world_size, broadcast_string, node_address, limit
        )
        options: dict[str, Any] = {
            "store": store,
            "rank": rank,
            "world_size": world_size,
            "timeout": limit,
        }
        if device.type == "cuda":
            watch = _init_gpu_process_group(world, options)
        else:
            with _translate_peer_errors():
                dist.init_process_group("gloo", **options)
        yield world
        ended = True
    finally:
        try:
            if watch is not None:
                watch.leave_ring(failed=not ended, timeout=timeout)
        finally:
            if dist.is_initialized():
                with suppress(RuntimeError):  # what broke it was raised already
                    dist.destroy_process_group()


def _connect_tcp_store(
    rank: int,
    world_size: int,
    broadcast_string: Callable[[str], str],
    node_address: str,
    timeout: timedelta,
) -> Any:
    """Connect to the store over which the ranks of a process group find each other; rank 0 serves it.

    Raises:
        LostRankError: it cannot be reached.
    """
    name = find_network_interface(node_address)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if (
            name is not None
        ):  # or gloo takes the address of the host's name, which may be 127.0.1.1
            os.environ.setdefault(variable, name)
    with _translate_peer_errors():
        # Rank 0 listens on a port that the system picks, so none can be taken.
        listening = (node_address, 0, world_size, True, timeout, False)
        store = dist.TCPStore(*listening) if rank == 0 else None  # type: ignore[attr-defined]
        host, _, port = broadcast_string(
            f"{node_address} {store.port}" if store else ""
        ).partition(" ")
        return store or dist.TCPStore(host, int(port), world_size, False, timeout)  # type: ignore[attr-defined]


def _init_gpu_process_group(world: World, options: dict[str, Any]) -> PeerMonitor:
    """Form the process group of a world of GPUs: NCCL for tensors on them, gloo for those on the CPU.

    With `device_id` NCCL connects here, and not in the first step. torch's own handling of NCCL's errors would end the
    process: it is off, and our watch aborts the communicator as soon as a peer is gone, and sets `world.lost`.

    Raises:
        AttemptError: the GPUs cannot be connected.
    """
    for variable in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_DUMP_ON_TIMEOUT"):
        os.environ.setdefault(variable, "0")
    torch.cuda.set_device(world.device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=world.device, **options)
        group: Any = dist.new_group(backend="gloo", timeout=options["timeout"])
    except RuntimeError as error:
        raise AttemptError(
            f"the ranks' GPUs could not be connected: {_strip_source_location(str(error))}"
        ) from error
    communicator = _get_nccl_backend(world.device)

    def abort_communicator() -> None:
        world.peer_lost.set()  # first: who waits for the device must not take what it then has for a sum
        with suppress(
            RuntimeError
        ):  # it does not end in time: whoever waits is ended by the watchdog
            communicator.abort()

    return PeerMonitor(group, world.rank, world.world_size, abort_communicator)


def _get_nccl_backend(device: torch.device) -> Any:
    """NCCL's part of the process group. What torch's own abort of a whole group uses has no public name."""
    group: Any = dist.group.WORLD
    return group._get_backend(device)


def find_network_interface(address: str) -> str | None:
    """The network interface of this host that has an IPv4 address; None where that cannot be found out."""
    if not hasattr(socket, "if_nameindex"):
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                request = name.encode()[:15].ljust(256, b"\0")
                found = fcntl.ioctl(probe.fileno(), 0x8915, request)[
                    20:24
                ]  # SIOCGIFADDR
                if socket.inet_ntoa(found) == address:
                    return name
    return None


def make_local_world(device: str) -> World:
    """A world of one process, on a GPU where there is one.

    Args:
        device: auto, cpu or cuda.

    Raises:
        UserError: `device` is cuda, and there is no GPU.
    """
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise UserError(
            "device is cuda, but torch finds no GPU here: use device=auto or device=cpu"
        )
    return World(
        torch.device("cuda", 0) if gpu and device != "cpu" else torch.device("cpu")
    )
