"""Resources of a run: what `auto` resolves to, how many workers fit, what stays idle.

The nodes are those of a Ray cluster, or one machine as the only node.
"""

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
    """All resources of the node, by Ray's names (CPU, GPU, ...)."""
    available_resources: dict[str, float]
    """Resources that no job holds."""
    draining: bool
    """True if the node is about to be taken away."""


class Allocation(NamedTuple):
    """Number of ranks of a run, and the resources of each."""

    min_workers: int
    max_workers: int
    cpus_per_worker: int
    gpus_per_worker: int
    """1, or 0 if the ranks compute on CPUs."""


def compute_allocation(
    config: Config,
    nodes: Sequence[ClusterNode],
    *,
    gpus_per_worker: int | None = None,
    only_available: bool = False,
) -> Allocation:
    """Compute what a run may use of a cluster.

    Args:
        config: the run; `auto` in its cluster section is resolved.
        nodes: the cluster, or one machine. Draining nodes do not count.
        gpus_per_worker: GPUs of each rank if already decided, since a run that began
            on GPUs stays on them; None: decide from the config and the nodes.
        only_available: divide only the cores that no job holds, not all of them.

    Raises:
        UserError: `device` and `cluster.gpus_per_worker` contradict each other.
    """
    steady_nodes = [node for node in nodes if not node.draining]
    num_gpus = sum(
        _count_resource(node.total_resources, "GPU") for node in steady_nodes
    )
    if gpus_per_worker is None:
        gpus_per_worker = resolve_gpus_per_worker(config, num_gpus)

    # auto: one rank per GPU, up to the number of virtual workers; one rank on CPUs.
    if config.cluster.workers != "auto":
        min_workers, max_workers = config.cluster.workers
    else:
        min_workers = 1
        max_workers = 1
        if gpus_per_worker:
            max_workers = max(1, min(config.virtual_workers, num_gpus))

    cpus_per_worker = config.cluster.cpus_per_worker
    if cpus_per_worker == "auto":
        node_resources = [
            node.available_resources if only_available else node.total_resources
            for node in steady_nodes
        ]
        cpus_per_worker = _resolve_cpus_per_worker(
            node_resources, max_workers, gpus_per_worker
        )
    return Allocation(min_workers, max_workers, cpus_per_worker, gpus_per_worker)


def resolve_gpus_per_worker(config: Config, num_gpus: int) -> int:
    """Return the GPUs of each rank, 0 or 1, for `num_gpus` GPUs in all.

    Raises:
        UserError: `device` and `cluster.gpus_per_worker` contradict each other.
    """
    device = config.device
    setting = config.cluster.gpus_per_worker
    if (device, setting) in (("cuda", 0), ("cpu", 1)):
        raise UserError(
            f"device is {device}, but cluster.gpus_per_worker is {setting}: "
            "set cluster.gpus_per_worker to auto"
        )
    if setting != "auto":
        return setting
    return int(device == "cuda" or (device == "auto" and num_gpus > 0))


def _resolve_cpus_per_worker(
    node_resources: Sequence[dict[str, float]], max_workers: int, gpus_per_worker: int
) -> int:
    """Return an equal share of the nodes' cores: per GPU, or without GPUs per worker.

    Args:
        node_resources: total or available resources of each node.
        max_workers: the most workers, which decide if there are no GPUs.
        gpus_per_worker: 0 or 1.
    """
    cores_per_node = [_count_resource(node, "CPU") for node in node_resources]
    if gpus_per_worker:
        gpus_per_node = [_count_resource(node, "GPU") for node in node_resources]
        # All workers get the smallest share. Nodes with fewer cores than GPUs are left
        # out: they would bring it below one core.
        shares = (
            cores // gpus
            for cores, gpus in zip(cores_per_node, gpus_per_node, strict=True)
            if 0 < gpus <= cores
        )
        return min(shares, default=1)

    # On CPUs: the largest share with which all workers still fit.
    for share in range(max(cores_per_node, default=1), 1, -1):
        if sum(cores // share for cores in cores_per_node) >= max_workers:
            return share
    return 1


def _count_resource(resources: dict[str, float], kind: str) -> int:
    return int(resources.get(kind, 0.0))


def count_fitting_workers(
    allocation: Allocation, nodes: Sequence[ClusterNode], worker_node_ids: Sequence[str]
) -> int:
    """Count the workers that fit beside other jobs; draining nodes do not count.

    Args:
        allocation: the resources of a worker.
        nodes: the cluster.
        worker_node_ids: the node of each worker that this run already has; their
            resources count as free.
    """
    num_workers = 0
    for node in nodes:
        if node.draining:
            continue
        # The scarcest resource of the node decides.
        num_workers += min(
            int(node.available_resources.get(kind, 0.0) / amount)
            for kind, amount in to_ray_resources(allocation).items()
            if amount
        )
        num_workers += worker_node_ids.count(node.id)
    return num_workers


def choose_num_workers(allocation: Allocation, nodes: Sequence[ClusterNode]) -> int:
    """Return how many workers a run would start with: those that fit, within range."""
    num_fitting = count_fitting_workers(allocation, nodes, worker_node_ids=[])
    return min(allocation.max_workers, max(allocation.min_workers, num_fitting))


def to_ray_resources(allocation: Allocation) -> dict[str, float]:
    """Return the resources of one worker by Ray's names."""
    return {
        "CPU": float(allocation.cpus_per_worker),
        "GPU": float(allocation.gpus_per_worker),
    }


def explain_shortage(allocation: Allocation, nodes: Sequence[ClusterNode]) -> str:
    """Explain why the minimum number of workers does not fit."""
    # Compare with all that the cluster has, held by other jobs or not.
    for kind, amount in (
        ("GPU", allocation.gpus_per_worker),
        ("CPU", allocation.cpus_per_worker),
    ):
        num_needed = allocation.min_workers * amount
        num_present = _sum_resource(nodes, kind)
        if num_needed > num_present:
            needed = _format_count(num_needed, kind)
            workers = _format_count(allocation.min_workers, "worker")
            return (
                f"the run needs {needed} (at least {workers} with {amount} each), "
                f"but the cluster has {num_present}"
            )

    num_fitting = count_fitting_workers(allocation, nodes, worker_node_ids=[])
    return (
        f"the run needs at least {allocation.min_workers} workers, but only "
        f"{num_fitting} fit beside the other jobs on the cluster"
    )


def _sum_resource(nodes: Sequence[ClusterNode], kind: str) -> int:
    """Return a resource of all nodes that are not draining, rounded down."""
    return int(
        sum(node.total_resources.get(kind, 0.0) for node in nodes if not node.draining)
    )


def describe_idle_gpus(
    config: Config,
    allocation: Allocation,
    num_workers: int,
    nodes: Sequence[ClusterNode],
) -> str | None:
    """Return a sentence on GPUs that stay idle, or None if all are used.

    Args:
        config: the run.
        allocation: the resources of a worker.
        num_workers: workers that are about to start.
        nodes: the cluster before they start.
    """
    # GPUs that no other job holds and that the workers will leave.
    steady_nodes = [node for node in nodes if not node.draining]
    num_gpus = sum(
        _count_resource(node.total_resources, "GPU") for node in steady_nodes
    )
    num_available = sum(
        _count_resource(node.available_resources, "GPU") for node in steady_nodes
    )
    num_idle = num_available - num_workers * allocation.gpus_per_worker
    if num_idle <= 0:
        return None
    verb = "stays" if num_idle == 1 else "stay"
    idle = f"{num_idle} of {_format_count(num_gpus, 'GPU')} {verb} idle"
    if not allocation.gpus_per_worker:
        return f"training on CPUs, and {idle}: {_explain_cpu_training(config)}"

    # Name the first limit that keeps the run from using more GPUs.
    if num_workers == config.virtual_workers:
        return (
            f"{idle}: a run has at most virtual_workers = {num_workers} workers "
            "(fixed for the whole run)"
        )
    if num_workers == allocation.max_workers:
        return (
            f"{idle}: cluster.workers allows {allocation.max_workers}: raise it, or "
            "set it to auto to use all GPUs"
        )
    return (
        f"{idle}: each worker needs {allocation.cpus_per_worker} CPU cores, and the "
        "nodes of these GPUs have too few free: lower cluster.cpus_per_worker"
    )


def _explain_cpu_training(config: Config) -> str:
    if config.device == "cpu":
        return "device is cpu"
    if config.cluster.gpus_per_worker == 0:
        return "cluster.gpus_per_worker is 0"
    # Decided by the first worker group of this launch.
    return "the run began on CPUs, and results on a GPU would differ"


def describe_allocation(
    config: Config,
    allocation: Allocation,
    nodes: Sequence[ClusterNode],
    *,
    is_elastic: bool,
) -> dict[str, str]:
    """Describe what a run would use of these nodes, by topic, for `--dry-run`.

    Args:
        config: the run.
        allocation: its allocation on these nodes.
        nodes: the cluster, or one machine.
        is_elastic: the number of workers may change while the run trains.
    """
    num_workers = choose_num_workers(allocation, nodes)
    device = "a GPU" if allocation.gpus_per_worker else "no GPU"
    cores = _format_count(allocation.cpus_per_worker, "CPU core")
    workers = f"{num_workers}, each with {device} and {cores}"
    if is_elastic and allocation.min_workers < allocation.max_workers:
        workers += (
            f", {allocation.min_workers} to {allocation.max_workers} "
            "as the cluster changes"
        )

    all_gpus = _format_count(_sum_resource(nodes, "GPU"), "GPU")
    all_cores = _format_count(_sum_resource(nodes, "CPU"), "CPU core")
    all_nodes = _format_count(len(nodes), "node")
    description = {
        "workers": workers,
        "available": f"{all_gpus} and {all_cores} on {all_nodes}",
    }
    idle = describe_idle_gpus(config, allocation, num_workers, nodes)
    if idle is not None:
        description["idle"] = idle
    return description


def _format_count(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def count_workers_per_node(config: Config, num_cpus: float, num_gpus: int) -> int:
    """Count the ranks that fit on a node with so many cores and GPUs.

    Raises:
        UserError: as `resolve_gpus_per_worker`.
    """
    setting = config.cluster.cpus_per_worker
    num_workers = int(num_cpus / (1 if setting == "auto" else setting))
    if resolve_gpus_per_worker(config, num_gpus):
        num_workers = min(num_workers, num_gpus)
    return num_workers


def describe_worker_request(config: Config, num_gpus: int) -> str:
    """Describe, for a message, what a rank needs on a node with `num_gpus` GPUs."""
    setting = config.cluster.cpus_per_worker
    cpus = _format_count(1 if setting == "auto" else setting, "CPU")
    gpus = _format_count(resolve_gpus_per_worker(config, num_gpus), "GPU")
    return f"{cpus} and {gpus}"
