"""How many workers a Ray cluster has room for, and which of its nodes are about to go."""

from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.exceptions import RaySystemError

from distrain.settings import Cluster

_PRIVATE_IS_GONE = (AttributeError, ImportError, RuntimeError, RaySystemError)


@dataclass(frozen=True)
class Node:
    """A node that is alive."""

    id: str
    address: str
    total: dict[str, float]
    """Resources that it has."""
    free: dict[str, float]
    """Resources that nobody holds."""
    draining: bool
    """It will be taken away."""


def look() -> list[Node]:
    """The cluster's nodes. Two private calls of Ray's make the view sharper; without them it is coarser, not wrong."""
    alive = {n["NodeID"]: n for n in ray.nodes() if n["Alive"]}
    try:
        draining = set(ray._private.state.state.get_draining_nodes())
    except _PRIVATE_IS_GONE:  # a drained node is then noticed when it is gone
        draining = set()
    try:
        free = ray._private.state.available_resources_per_node()
    except _PRIVATE_IS_GONE:  # all of the cluster's together: what is too much is found out by trying
        first = next(iter(alive))
        free = {first: ray.available_resources()}
    return [
        Node(node, n["NodeManagerAddress"], n["Resources"], free.get(node, {}), node in draining)
        for node, n in alive.items()
    ]


def call_for(cluster: Cluster, workers: int, nodes: Sequence[Node], held: Sequence[str]) -> None:
    """Tell the cluster's autoscaler, where there is one, how many workers are wanted; 0: none any more.

    It takes this for the size of the whole cluster, so that what others hold is asked for too.

    Args:
        cluster: what a worker needs.
        workers: how many.
        nodes: the cluster.
        held: nodes of our own workers, by id.
    """
    from ray.autoscaler.sdk import request_resources

    bundles = [_need(cluster)] * workers
    for node in nodes if workers else ():
        ours = {kind: need * held.count(node.id) for kind, need in _need(cluster).items()}
        others = {kind: node.total.get(kind, 0.0) - node.free.get(kind, 0.0) - own for kind, own in ours.items()}
        if any(amount > 0 for amount in others.values()):
            bundles.append({kind: max(0.0, amount) for kind, amount in others.items()})
    request_resources(bundles=bundles)


def shortage(cluster: Cluster, nodes: Sequence[Node]) -> str:
    """Why the least number of workers does not fit."""
    least = cluster.workers[0]
    for kind, each in (("GPU", cluster.gpus_per_worker), ("CPU", cluster.cpus_per_worker)):
        has = int(sum(node.total.get(kind, 0.0) for node in nodes if not node.draining))
        if least * each > has:
            return f"the run asks for {least * each} {kind}s ({least} workers of {each}), and the cluster has {has}"
    found = room(cluster, nodes, held=[])
    return f"the cluster has room for {found} of at least {least} workers, beside what others hold"


def room(cluster: Cluster, nodes: Sequence[Node], held: Sequence[str]) -> int:
    """How many workers fit beside what other jobs hold; `held`: nodes of our own workers, by id."""
    need = _need(cluster)
    return sum(
        min(int(node.free.get(k, 0.0) / n) for k, n in need.items() if n) + held.count(node.id)
        for node in nodes
        if not node.draining
    )


def _need(cluster: Cluster) -> dict[str, float]:
    return {"CPU": float(cluster.cpus_per_worker), "GPU": float(cluster.gpus_per_worker)}
