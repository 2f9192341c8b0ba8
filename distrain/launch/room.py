"""How many workers a Ray cluster has room for, and which of its nodes are about to go."""

from collections.abc import Mapping

import ray

from distrain.config import Config


def room(config: Config, held: list[str]) -> int:
    """How many workers the cluster has room for, beside what other jobs hold; `held`: hosts of our own workers."""
    cluster = config.cluster
    need = {"CPU": float(cluster.cpus_per_worker), "GPU": float(cluster.gpus_per_worker)}
    alive = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}
    leaving = draining()
    fits = 0
    for node, free in _free_resources(alive).items():
        if node in leaving or (node and node not in alive):
            continue
        ours = len(held) if not node else held.count(alive[node])
        fits += min(int(free.get(k, 0.0) / n) + ours for k, n in need.items() if n)
    return fits


def _free_resources(alive: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Free resources by node; all of the cluster's under an empty name where Ray does not tell them apart."""
    try:
        found: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
        return found
    except (AttributeError, RuntimeError, ImportError):  # private: may be gone in another version
        return {"": ray.available_resources()}


def draining() -> dict[str, str]:
    """Address by id of the nodes that are to be taken away; none where Ray does not tell."""
    try:
        ids = ray._private.state.state.get_draining_nodes()
    except (AttributeError, RuntimeError, ImportError):  # private: a drained node is then noticed when it is gone
        return {}
    return {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] in ids}
