"""World: a rank, its device, and the collectives over all ranks."""

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

# Linux's request for the IPv4 address of a network interface, from <linux/sockios.h>.
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class World:
    """A rank among `world_size` ranks, and the device it computes on.

    Ranks branch only on values that a collective made equal on all of them. Collectives
    on the CPU (gloo) raise LostRankError if another rank is lost; after one on GPUs
    (NCCL), only `synchronize_device` does.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    num_cores: int = field(default_factory=count_available_cores)
    """CPU cores of this rank."""
    stop_requested: threading.Event = field(default_factory=threading.Event)
    """Set from outside, on any rank, to end the run after a step, with a checkpoint."""
    launch_id: str = field(default_factory=lambda: secrets.token_hex(8))
    """Id of the launch: one call of `distrain train`, which may take several attempts.
    An attempt takes over the run directory from an earlier attempt of the same launch
    at once, without waiting for its lease to expire."""
    node_address: str = "127.0.0.1"
    """Address of this node that other ranks can reach."""
    on_checkpoint: Callable[[int, str | None], None] = lambda step, name: None
    """Called on all ranks with the step of each complete checkpoint, and with its name
    on rank 0, None on the others."""
    desired_world_size: int = 1
    """Target world size: an elastic run may have fewer ranks for a while."""
    peer_lost: threading.Event = field(default_factory=threading.Event)
    """Set when another rank is lost, and the collectives of this rank's GPU are
    therefore aborted."""

    @property
    def is_rank_zero(self) -> bool:
        """True on rank 0, which logs and writes checkpoints."""
        return self.rank == 0

    def local_virtual_workers(self, num_virtual_workers: int) -> range:
        """Return the virtual workers of this rank, consecutive numbers.

        Each rank has floor or ceil of num_virtual_workers / world_size of them.
        """
        first = self.rank * num_virtual_workers // self.world_size
        end = (self.rank + 1) * num_virtual_workers // self.world_size
        return range(first, end)

    def all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        """Start to sum a tensor over all ranks, in place; return a function that waits.

        Asynchronous, unlike torch's default. On a GPU the returned function makes the
        current stream wait, not the host.
        """
        if self.world_size == 1:
            return lambda: None
        with _translate_peer_errors():
            work = dist.all_reduce(tensor, async_op=True)

        def wait() -> None:
            with _translate_peer_errors():
                work.wait()

        return wait

    def all_reduce_ints(self, values: Sequence[int]) -> list[int]:
        """Return the sums of int64 values over all ranks."""
        tensor = torch.tensor(values, dtype=torch.int64)
        self.all_reduce(tensor)()
        sums: list[int] = tensor.tolist()
        return sums

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite a tensor with rank 0's."""
        if self.world_size > 1:
            with _translate_peer_errors():
                dist.broadcast(tensor, 0)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the values that all ranks passed, by rank, on every rank.

        Values travel as JSON, unlike in torch: tuples come back as lists, and keys as
        strings, on a single rank too.
        """
        text = json.dumps(value)
        if self.world_size == 1:
            return [json.loads(text)]
        encoded = bytearray(text.encode())
        data = torch.frombuffer(encoded, dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        with _translate_peer_errors():
            # all_gather needs tensors of one shape: gather the sizes first, then the
            # values, padded to the longest.
            dist.all_gather(sizes, torch.tensor([len(data)]))
            longest = max(int(size) for size in sizes)
            padded = torch.cat([data, data.new_zeros(longest - len(data))])
            gathered = [torch.zeros_like(padded) for _ in sizes]
            dist.all_gather(gathered, padded)
        return [
            json.loads(bytes(row[: int(size)].tolist()))
            for row, size in zip(gathered, sizes, strict=True)
        ]

    def synchronize_device(self) -> None:
        """Block until all work queued on this rank's device is done.

        Not a barrier: it does not wait for other ranks.

        Raises:
            LostRankError: another rank is lost, so the results of all-reduces on the
                device are invalid.
        """
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            # The all-reduce may have been reading the memory of a GPU that is lost.
            if self.peer_lost.is_set():
                detail = _strip_source_location(str(error))
                raise LostRankError(f"another rank was lost: {detail}") from error
            raise
        # An aborted all-reduce returns as if it were complete: check after the wait.
        if self.peer_lost.is_set():
            raise LostRankError(
                "another rank was lost: the all-reduce on the GPU was aborted"
            )

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Raise a UserError or RunError on every rank if the block raises it on one.

        A collective: all ranks must enter the block. Other exceptions, LostRankError
        among them, are raised on their own rank only.

        Raises:
            UserError or RunError: that of the lowest rank which raised one.
        """
        own_error: UserError | RunError | None = None
        try:
            yield
        except LostRankError:
            # A collective with the lost rank would only fail, or wait for it.
            raise
        except (UserError, RunError) as error:
            own_error = error
        if self.world_size == 1:
            if own_error is not None:
                raise own_error
            return

        report = own_error and [type(own_error).__name__, str(own_error)]
        # distrain raises these three; a subclass of the user's own ends the attempt.
        error_types = {
            "UserError": UserError,
            "RunError": RunError,
            "AttemptError": AttemptError,
        }
        for rank_report in self.all_gather_object(report):
            if rank_report is not None:
                name, message = rank_report
                raise error_types.get(name, AttemptError)(message) from own_error


@contextmanager
def _translate_peer_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # All errors of torch.distributed are RuntimeErrors.
        detail = _strip_source_location(str(error))
        raise LostRankError(
            f"another rank was lost or does not respond: {detail}"
        ) from error


def _strip_source_location(message: str) -> str:
    """Return an error's first sentence, without torch's "[file:line]" before it."""
    first_line = message.splitlines()[0]
    without_location = re.sub(r"^\[[^]]*\] *", "", first_line)
    return without_location.split(". ")[0]


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
    launch_id: str,
    on_checkpoint: Callable[[int, str | None], None] = lambda step, name: None,
    desired_world_size: int | None = None,
) -> Iterator[World]:
    """Initialize the process group of a run, which ends with the block.

    A world of one rank needs no group, and gets none.

    Args:
        device: the device of this rank.
        rank: 0 to world_size - 1.
        world_size: number of ranks.
        broadcast_string: returns on every rank the string that rank 0 passed to it.
        node_address: address of this node that the other ranks can reach.
        timeout: seconds after which a rank that is missing from a collective counts
            as lost.
        num_cores: CPU cores that this rank may use.
        launch_id, on_checkpoint: as in World.
        desired_world_size: ranks that the run would like to have; None: world_size.

    Raises:
        LostRankError: the ranks cannot reach each other.
    """
    world = World(
        device,
        rank,
        world_size,
        num_cores,
        launch_id=launch_id,
        node_address=node_address,
        on_checkpoint=on_checkpoint,
        desired_world_size=desired_world_size or world_size,
    )
    if world_size == 1:
        yield world
        return

    monitor: PeerMonitor | None = None
    failed = True
    try:
        monitor = _join_process_group(world, broadcast_string, timeout)
        yield world
        failed = False
    finally:
        # Leave the peer monitor first, in which the ranks watch each other in a ring:
        # destroying the group closes connections, which the next rank would take for a
        # lost rank.
        try:
            if monitor is not None:
                monitor.leave_ring(failed=failed, timeout=timeout)
        finally:
            if dist.is_initialized():
                # The error that broke the group has been raised already.
                with suppress(RuntimeError):
                    dist.destroy_process_group()


def _join_process_group(
    world: World, broadcast_string: Callable[[str], str], timeout: float
) -> PeerMonitor | None:
    """Join torch's process group; on GPUs also start to watch the other ranks."""
    timeout_delta = timedelta(seconds=timeout)
    store = _connect_tcp_store(
        world.rank,
        world.world_size,
        broadcast_string,
        world.node_address,
        timeout_delta,
    )
    options: dict[str, Any] = {
        "store": store,
        "rank": world.rank,
        "world_size": world.world_size,
        "timeout": timeout_delta,
    }
    if world.device.type == "cuda":
        return _init_gpu_process_group(world, options)
    with _translate_peer_errors():
        dist.init_process_group("gloo", **options)
    return None


def _connect_tcp_store(
    rank: int,
    world_size: int,
    broadcast_string: Callable[[str], str],
    node_address: str,
    timeout: timedelta,
) -> Any:
    """Connect to the store over which the ranks find each other; rank 0 serves it.

    Raises:
        LostRankError: the store cannot be reached.
    """
    interface = find_network_interface(node_address)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # Without it gloo uses the address that the host name resolves to, which may be
        # 127.0.1.1.
        if interface is not None:
            os.environ.setdefault(variable, interface)

    with _translate_peer_errors():
        store = None
        own_endpoint = ""
        if rank == 0:
            # Port 0: the system picks a free port, so none can be taken already. Not
            # waiting for the other ranks: they do not know the port yet.
            store = dist.TCPStore(node_address, 0, world_size, True, timeout, False)  # type: ignore[attr-defined]
            own_endpoint = f"{node_address} {store.port}"
        host, _, port = broadcast_string(own_endpoint).partition(" ")
        if store is not None:
            return store
        return dist.TCPStore(host, int(port), world_size, False, timeout)  # type: ignore[attr-defined]


def _init_gpu_process_group(world: World, options: dict[str, Any]) -> PeerMonitor:
    """Initialize the process group on GPUs, and start to watch the other ranks.

    NCCL serves tensors on GPUs, gloo those on the CPU.

    Raises:
        AttemptError: the GPUs cannot be connected.
    """
    # torch's own handling of NCCL errors would end the process. The monitor replaces
    # it: it sets `world.peer_lost` and aborts the communicator once a peer is lost.
    for variable in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_DUMP_ON_TIMEOUT"):
        os.environ.setdefault(variable, "0")

    torch.cuda.set_device(world.device)
    try:
        # With `device_id` NCCL connects here, and not in the first step.
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=world.device, **options)
        group: Any = dist.new_group(backend="gloo", timeout=options["timeout"])
    except RuntimeError as error:
        detail = _strip_source_location(str(error))
        raise AttemptError(
            f"the ranks' GPUs could not be connected: {detail}"
        ) from error
    communicator = _get_nccl_backend(world.device)

    def abort_communicator() -> None:
        # Set the flag first: the abort unblocks a thread in `synchronize_device`,
        # which must not treat the buffer as a finished all-reduce.
        world.peer_lost.set()
        # An abort that times out raises. The run's watchdog then ends this process.
        with suppress(RuntimeError):
            communicator.abort()

    return PeerMonitor(group, world.rank, world.world_size, abort_communicator)


def _get_nccl_backend(device: torch.device) -> Any:
    """Return the NCCL part of the process group.

    torch's own abort of a whole group uses the same method; it has no public name.
    """
    group: Any = dist.group.WORLD
    return group._get_backend(device)


def find_network_interface(address: str) -> str | None:
    """Return the name of the network interface of this host with an IPv4 address.

    None if no interface has the address, or the system does not list its interfaces.
    """
    if not hasattr(socket, "if_nameindex"):
        return None
    # fcntl does not exist on Windows.
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            # The ioctl fails on an interface without an address.
            with suppress(OSError):
                request = name.encode()[:15].ljust(256, b"\0")
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def make_local_world(device: str) -> World:
    """Create a world of one process, on a GPU if there is one.

    Args:
        device: auto, cpu or cuda.

    Raises:
        UserError: `device` is cuda, and there is no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UserError(
            "device is cuda, but torch finds no GPU here: use device=auto or device=cpu"
        )
    if has_gpu and device != "cpu":
        return World(torch.device("cuda", 0))
    return World(torch.device("cpu"))
