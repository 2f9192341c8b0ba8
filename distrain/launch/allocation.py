"""Which share of a cluster, or of one machine, a run takes: what `auto` comes to, what fits, and what stays idle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distrain.config import Config
from distrain.errors import UserError


@dataclass(frozen=True)
class ClusterNode:
    """A node that is alive."""

    id: str
    address: str
    total_resources: dict[str, float]
    """Resources that it has."""
    available_resources: dict[str, float]
    """Resources that nobody holds."""
    draining: bool
    """It will be taken away."""


class Allocation(NamedTuple):
    """How many ranks, and what each of them holds."""

    min_workers: int
    max_workers: int
    cpus_per_worker: int
    gpus_per_worker: int
    """1, or 0: the ranks compute on CPUs."""


def compute_allocation(
    config: Config,
    nodes: Sequence[ClusterNode],
    *,
    gpus_per_worker: int | None = None,
    only_available: bool = False,
) -> Allocation:
    """Count what a run may take.

    Args:
        config: the run; `auto` in its cluster section is filled in.
        nodes: the cluster, or one machine.
        gpus: GPUs of each rank where that is decided, since a run that began on GPUs stays on them; None: decide.
        beside: share out the cores that nobody holds, not all of them.

    Raises:
        UserError: `device` and `cluster.gpus_per_worker` contradict each other.
    """
    steady = [node for node in nodes if not node.draining]
    there = sum(_count_resource(node.total_resources, "GPU") for node in steady)
    gpus_per_worker = (
        resolve_gpus_per_worker(config, there)
        if gpus_per_worker is None
        else gpus_per_worker
    )
    wanted, cpus = config.cluster.workers, config.cluster.cpus_per_worker
    if wanted != "auto":
        least, most = wanted
    else:
        least, most = (
            1,
            max(1, min(config.virtual_workers, there)) if gpus_per_worker else 1,
        )
    if cpus == "auto":
        cpus = _resolve_cpus_per_worker(
            [
                node.available_resources if only_available else node.total_resources
                for node in steady
            ],
            most,
            gpus_per_worker,
        )
    return Allocation(least, most, cpus, gpus_per_worker)


def resolve_gpus_per_worker(config: Config, num_gpus: int) -> int:
    """GPUs of each rank where there are so many in all.

    Raises:
        UserError: `device` and `cluster.gpus_per_worker` contradict each other.
    """
    asked, device = config.cluster.gpus_per_worker, config.device
    if (device, asked) in (("cuda", 0), ("cpu", 1)):
        raise UserError(
            f"device is {device}, and cluster.gpus_per_worker is {asked}: set it to auto"
        )
    if asked != "auto":
        return asked
    return int(device == "cuda" or (device == "auto" and num_gpus > 0))


def _resolve_cpus_per_worker(
    nodes: Sequence[dict[str, float]], max_workers: int, gpus: int
) -> int:
    """An equal share of the nodes' cores: for each GPU, or for the most workers."""
    cores = [_count_resource(node, "CPU") for node in nodes]
    if gpus:
        there = [_count_resource(node, "GPU") for node in nodes]
        # A node with fewer cores than GPUs is left out: all workers would have as few.
        return min(
            (n // gpus for n, gpus in zip(cores, there, strict=True) if 0 < gpus <= n),
            default=1,
        )
    return next(
        (
            each
            for each in range(max(cores, default=1), 1, -1)
            if sum(n // each for n in cores) >= max_workers
        ),
        1,
    )


def _count_resource(resources: dict[str, float], kind: str) -> int:
    return int(resources.get(kind, 0.0))


def count_fitting_workers(
    allocation: Allocation, nodes: Sequence[ClusterNode], worker_node_ids: Sequence[str]
) -> int:
    """How many workers fit beside what other jobs hold; `held`: nodes of our own workers, by id."""
    return sum(
        min(
            int(node.available_resources.get(kind, 0.0) / each)
            for kind, each in to_ray_resources(allocation).items()
            if each
        )
        + worker_node_ids.count(node.id)
        for node in nodes
        if not node.draining
    )


def choose_num_workers(allocation: Allocation, nodes: Sequence[ClusterNode]) -> int:
    """How many workers a run would have now: as many as fit, at least the least and at most the most."""
    return min(
        allocation.max_workers,
        max(
            allocation.min_workers,
            count_fitting_workers(allocation, nodes, worker_node_ids=[]),
        ),
    )


def to_ray_resources(allocation: Allocation) -> dict[str, float]:
    """The resources of one worker, as Ray names them."""
    return {
        "CPU": float(allocation.cpus_per_worker),
        "GPU": float(allocation.gpus_per_worker),
    }


def explain_shortage(allocation: Allocation, nodes: Sequence[ClusterNode]) -> str:
    """Why the least number of workers does not fit."""
    for kind, each in (
        ("GPU", allocation.gpus_per_worker),
        ("CPU", allocation.cpus_per_worker),
    ):
        has = int(
            sum(
                node.total_resources.get(kind, 0.0)
                for node in nodes
                if not node.draining
            )
        )
        if allocation.min_workers * each > has:
            asks = f"{_format_count(allocation.min_workers * each, kind)} ({_format_count(allocation.min_workers, 'worker')} of {each})"
            return f"the run asks for {asks}, and the cluster has {has}"
    found = count_fitting_workers(allocation, nodes, worker_node_ids=[])
    return f"the cluster has room for {found} of at least {allocation.min_workers} workers, beside what others hold"


def describe_idle_gpus(
    config: Config,
    allocation: Allocation,
    num_workers: int,
    nodes: Sequence[ClusterNode],
) -> str | None:
    """A sentence on GPUs that stay idle when so many workers start on these nodes; None where there are none."""
    steady = [node for node in nodes if not node.draining]
    there = sum(_count_resource(node.total_resources, "GPU") for node in steady)
    idle = (
        sum(_count_resource(node.available_resources, "GPU") for node in steady)
        - num_workers * allocation.gpus_per_worker
    )
    if idle <= 0:
        return None
    stay = f"{idle} of {_format_count(there, 'GPU')} stay{'s' * (idle == 1)} idle"
    if not allocation.gpus_per_worker:
        why = "the run began on CPUs, and the bits of a GPU are others"
        if config.device == "cpu":
            why = "device is cpu"
        elif config.cluster.gpus_per_worker == 0:
            why = "cluster.gpus_per_worker is 0"
        return f"training on CPUs, and {stay}: {why}"
    if num_workers == config.virtual_workers:
        return f"{stay}: virtual_workers = {num_workers} is the most that can share the work (it is fixed for a run)"
    if num_workers == allocation.max_workers:
        return f"{stay}: cluster.workers = {allocation.max_workers} is asked for, and auto would use all"
    return f"{stay}: each worker asks for {allocation.cpus_per_worker} CPU cores, and so many are not free beside them"


def describe_allocation(
    config: Config,
    allocation: Allocation,
    nodes: Sequence[ClusterNode],
    *,
    is_elastic: bool,
) -> dict[str, str]:
    """What a run would take of these nodes, by name, for `--dry-run`; `cluster`: their number may change."""
    workers = choose_num_workers(allocation, nodes)
    device = "a GPU" if allocation.gpus_per_worker else "no GPU"
    grows = (
        f", {allocation.min_workers} to {allocation.max_workers} as the cluster changes"
        if is_elastic and allocation.min_workers < allocation.max_workers
        else ""
    )
    found = {
        "workers": f"{workers}, each with {device} and {_format_count(allocation.cpus_per_worker, 'CPU core')}{grows}"
    }
    totals = [
        int(
            sum(
                node.total_resources.get(kind, 0.0)
                for node in nodes
                if not node.draining
            )
        )
        for kind in ("GPU", "CPU")
    ]
    found["of"] = (
        f"{_format_count(totals[0], 'GPU')} and {_format_count(totals[1], 'CPU core')} on {_format_count(len(nodes), 'node')}"
    )
    if sentence := describe_idle_gpus(config, allocation, workers, nodes):
        found["idle"] = sentence
    return found


def _format_count(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def count_workers_per_node(config: Config, num_cpus: float, num_gpus: int) -> int:
    """How many ranks a node with so many cores and GPUs has room for.

    Raises:
        UserError: as `share_of`.
    """
    each = config.cluster.cpus_per_worker
    found = int(num_cpus / (1 if each == "auto" else each))
    return min(found, num_gpus) if resolve_gpus_per_worker(config, num_gpus) else found


def describe_worker_request(config: Config, num_gpus: int) -> str:
    """What a rank asks for on a node with so many GPUs, for a sentence."""
    each = config.cluster.cpus_per_worker
    cpus = 1 if each == "auto" else each
    wanted = resolve_gpus_per_worker(config, num_gpus)
    return f"{_format_count(cpus, 'CPU')} and {_format_count(wanted, 'GPU')}"
