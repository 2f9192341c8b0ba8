"""Which share of a cluster, or of one machine, a run takes: what `auto` comes to, what fits, and what stays idle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distrain.config import Config
from distrain.errors import UserError


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


class Share(NamedTuple):
    """How many ranks, and what each of them holds."""

    least: int
    most: int
    cpus: int
    gpus: int
    """1, or 0: the ranks compute on CPUs."""


def share_of(
    config: Config,
    nodes: Sequence[Node],
    *,
    gpus: int | None = None,
    beside: bool = False,
) -> Share:
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
    there = sum(_whole(node.total, "GPU") for node in steady)
    gpus = gpus_per_worker(config, there) if gpus is None else gpus
    wanted, cpus = config.cluster.workers, config.cluster.cpus_per_worker
    if wanted != "auto":
        least, most = wanted
    else:
        least, most = 1, max(1, min(config.virtual_workers, there)) if gpus else 1
    if cpus == "auto":
        cpus = _cpus(
            [node.free if beside else node.total for node in steady], most, gpus
        )
    return Share(least, most, cpus, gpus)


def gpus_per_worker(config: Config, there: int) -> int:
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
    return int(device == "cuda" or (device == "auto" and there > 0))


def _cpus(nodes: Sequence[dict[str, float]], most: int, gpus: int) -> int:
    """An equal share of the nodes' cores: for each GPU, or for the most workers."""
    cores = [_whole(node, "CPU") for node in nodes]
    if gpus:
        there = [_whole(node, "GPU") for node in nodes]
        # A node with fewer cores than GPUs is left out: all workers would have as few.
        return min(
            (n // gpus for n, gpus in zip(cores, there, strict=True) if 0 < gpus <= n),
            default=1,
        )
    return next(
        (
            each
            for each in range(max(cores, default=1), 1, -1)
            if sum(n // each for n in cores) >= most
        ),
        1,
    )


def _whole(resources: dict[str, float], kind: str) -> int:
    return int(resources.get(kind, 0.0))


def room(share: Share, nodes: Sequence[Node], held: Sequence[str]) -> int:
    """How many workers fit beside what other jobs hold; `held`: nodes of our own workers, by id."""
    return sum(
        min(
            int(node.free.get(kind, 0.0) / each)
            for kind, each in need(share).items()
            if each
        )
        + held.count(node.id)
        for node in nodes
        if not node.draining
    )


def fitting(share: Share, nodes: Sequence[Node]) -> int:
    """How many workers a run would have now: as many as fit, at least the least and at most the most."""
    return min(share.most, max(share.least, room(share, nodes, held=[])))


def need(share: Share) -> dict[str, float]:
    """The resources of one worker, as Ray names them."""
    return {"CPU": float(share.cpus), "GPU": float(share.gpus)}


def shortage(share: Share, nodes: Sequence[Node]) -> str:
    """Why the least number of workers does not fit."""
    for kind, each in (("GPU", share.gpus), ("CPU", share.cpus)):
        has = int(sum(node.total.get(kind, 0.0) for node in nodes if not node.draining))
        if share.least * each > has:
            asks = f"{_number(share.least * each, kind)} ({_number(share.least, 'worker')} of {each})"
            return f"the run asks for {asks}, and the cluster has {has}"
    found = room(share, nodes, held=[])
    return f"the cluster has room for {found} of at least {share.least} workers, beside what others hold"


def remark(
    config: Config, share: Share, workers: int, nodes: Sequence[Node]
) -> str | None:
    """A sentence on GPUs that stay idle when so many workers start on these nodes; None where there are none."""
    steady = [node for node in nodes if not node.draining]
    there = sum(_whole(node.total, "GPU") for node in steady)
    idle = sum(_whole(node.free, "GPU") for node in steady) - workers * share.gpus
    if idle <= 0:
        return None
    stay = f"{idle} of {_number(there, 'GPU')} stay{'s' * (idle == 1)} idle"
    if not share.gpus:
        why = "the run began on CPUs, and the bits of a GPU are others"
        if config.device == "cpu":
            why = "device is cpu"
        elif config.cluster.gpus_per_worker == 0:
            why = "cluster.gpus_per_worker is 0"
        return f"training on CPUs, and {stay}: {why}"
    if workers == config.virtual_workers:
        return f"{stay}: virtual_workers = {workers} is the most that can share the work (it is fixed for a run)"
    if workers == share.most:
        return f"{stay}: cluster.workers = {share.most} is asked for, and auto would use all"
    return f"{stay}: each worker asks for {share.cpus} CPU cores, and so many are not free beside them"


def described(
    config: Config, share: Share, nodes: Sequence[Node], *, cluster: bool
) -> dict[str, str]:
    """What a run would take of these nodes, by name, for `--dry-run`; `cluster`: their number may change."""
    workers = fitting(share, nodes)
    device = "a GPU" if share.gpus else "no GPU"
    grows = (
        f", {share.least} to {share.most} as the cluster changes"
        if cluster and share.least < share.most
        else ""
    )
    found = {
        "workers": f"{workers}, each with {device} and {_number(share.cpus, 'CPU core')}{grows}"
    }
    totals = [
        int(sum(node.total.get(kind, 0.0) for node in nodes if not node.draining))
        for kind in ("GPU", "CPU")
    ]
    found["of"] = (
        f"{_number(totals[0], 'GPU')} and {_number(totals[1], 'CPU core')} on {_number(len(nodes), 'node')}"
    )
    if sentence := remark(config, share, workers, nodes):
        found["idle"] = sentence
    return found


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def workers_of(config: Config, cpus: float, gpus: int) -> int:
    """How many ranks a node with so many cores and GPUs has room for.

    Raises:
        UserError: as `share_of`.
    """
    each = config.cluster.cpus_per_worker
    found = int(cpus / (1 if each == "auto" else each))
    return min(found, gpus) if gpus_per_worker(config, gpus) else found


def asked(config: Config, gpus: int) -> str:
    """What a rank asks for on a node with so many GPUs, for a sentence."""
    each = config.cluster.cpus_per_worker
    cpus = 1 if each == "auto" else each
    wanted = gpus_per_worker(config, gpus)
    return f"{_number(cpus, 'CPU')} and {_number(wanted, 'GPU')}"
