"""What `auto` in a run's cluster section comes to, what fits, and the sentences on it."""

import pytest
import torch

from distrain.config import parse_config
from distrain.errors import UserError
from distrain.launch.allocation import (
    Allocation,
    ClusterNode,
    choose_num_workers,
    compute_allocation,
    count_fitting_workers,
    count_workers_per_node,
    describe_allocation,
    describe_idle_gpus,
    explain_shortage,
)
from distrain.launch.local import count_local_ranks, get_local_node

BASE = {
    "data": {"train": "x"},
    "schedule": {"name": "constant", "lr": 1.0},
    "global_batch": 64,
}


def config(v=8, device="auto", **cluster):
    return parse_config(
        {**BASE, "virtual_workers": v, "device": device, "cluster": cluster}, "test"
    )


def node(address, cpus, gpus=0.0, *, free=None, draining=False):
    total = {"CPU": float(cpus), "GPU": float(gpus)}
    free = total if free is None else {"CPU": float(free[0]), "GPU": float(free[1])}
    return ClusterNode(address, f"address of {address}", total, free, draining)


def machine(gpus, cpus=16):
    return [node("here", cpus, gpus)]


@pytest.mark.parametrize(
    ("gpus", "v", "wanted", "sentence"),
    [
        (0, 1, Allocation(1, 1, 16, 0), None),
        (0, 8, Allocation(1, 1, 16, 0), None),
        (1, 1, Allocation(1, 1, 16, 1), None),
        (1, 8, Allocation(1, 1, 16, 1), None),
        (
            3,
            1,
            Allocation(1, 1, 5, 1),
            "2 of 3 GPUs stay idle: a run has at most virtual_workers = 1 workers",
        ),
        (3, 8, Allocation(1, 3, 5, 1), None),
        (
            8,
            1,
            Allocation(1, 1, 2, 1),
            "7 of 8 GPUs stay idle: a run has at most virtual_workers = 1 workers",
        ),
        (8, 8, Allocation(1, 8, 2, 1), None),
        (
            8,
            4,
            Allocation(1, 4, 2, 1),
            "4 of 8 GPUs stay idle: a run has at most virtual_workers = 4 workers",
        ),
    ],
)
def test_auto_is_every_gpu_and_at_most_v(gpus, v, wanted, sentence):
    settings, nodes = config(v), machine(gpus)
    found = compute_allocation(settings, nodes)
    assert found == wanted
    assert choose_num_workers(found, nodes) == found.max_workers
    said = describe_idle_gpus(settings, found, choose_num_workers(found, nodes), nodes)
    assert said is None if sentence is None else said.startswith(sentence), said


@pytest.mark.parametrize(
    ("changes", "gpus", "wanted", "sentence"),
    [
        (
            {"device": "cpu"},
            1,
            Allocation(1, 1, 16, 0),
            "training on CPUs, and 1 of 1 GPU stays idle: device is cpu",
        ),
        ({"device": "cpu"}, 0, Allocation(1, 1, 16, 0), None),
        (
            {"gpus_per_worker": 0},
            8,
            Allocation(1, 1, 16, 0),
            "training on CPUs, and 8 of 8 GPUs stay idle: cluster.gpus_per_worker is 0",
        ),
        (
            {"workers": 2},
            8,
            Allocation(2, 2, 2, 1),
            "6 of 8 GPUs stay idle: cluster.workers allows 2: raise it, or set it to auto "
            "to use all GPUs",
        ),
        ({"device": "cuda"}, 0, Allocation(1, 1, 1, 1), None),
        ({"device": "cuda", "workers": [1, 8]}, 8, Allocation(1, 8, 2, 1), None),
        (
            {"cpus_per_worker": 3},
            8,
            Allocation(1, 8, 3, 1),
            "3 of 8 GPUs stay idle: each worker needs 3 CPU cores",
        ),
    ],
)
def test_what_is_asked_for_is_taken_and_idle_gpus_are_said(
    changes, gpus, wanted, sentence
):
    settings, nodes = config(**changes), machine(gpus)
    found = compute_allocation(settings, nodes)
    assert found == wanted
    said = describe_idle_gpus(settings, found, choose_num_workers(found, nodes), nodes)
    assert said is None if sentence is None else said.startswith(sentence), said


@pytest.mark.parametrize(("device", "gpus"), [("cuda", 0), ("cpu", 1)])
def test_a_contradiction_is_refused(device, gpus):
    with pytest.raises(
        UserError, match=f"device is {device}, but cluster.gpus_per_worker is {gpus}"
    ):
        compute_allocation(config(device=device, gpus_per_worker=gpus), machine(8))


def test_a_cluster_is_counted_as_it_is_now():
    """It never waits for a node that is gone, or about to go; and does not leave the GPUs it began on."""
    settings = config(16)
    nodes = [
        node("head", 2),
        node("a", 16, 4),
        node("b", 8, 4),
        node("c", 16, 8, draining=True),
    ]
    share = compute_allocation(settings, nodes)
    assert share == Allocation(1, 8, 2, 1)
    assert count_fitting_workers(share, nodes, worker_node_ids=[]) == 8
    assert compute_allocation(settings, nodes[:2]) == Allocation(1, 4, 4, 1)
    assert compute_allocation(settings, nodes[:1]) == Allocation(1, 1, 2, 0)
    alone = compute_allocation(
        settings, nodes[:1], gpus_per_worker=share.gpus_per_worker
    )
    assert alone == Allocation(1, 1, 1, 1)
    assert (
        explain_shortage(alone, nodes[:1])
        == "the run needs 1 GPU (at least 1 worker with 1 each), but the cluster has 0"
    )


def test_cpu_workers_share_the_cores_so_that_the_most_of_them_fit():
    nodes = [node("a", 8), node("b", 8), node("c", 2)]
    assert compute_allocation(config(workers=1), nodes).cpus_per_worker == 8
    assert compute_allocation(config(workers=[1, 2]), nodes).cpus_per_worker == 8
    assert compute_allocation(config(workers=[1, 3]), nodes).cpus_per_worker == 4
    assert compute_allocation(config(workers=8), nodes).cpus_per_worker == 2
    assert compute_allocation(config(v=64, workers=64), nodes).cpus_per_worker == 1


def test_beside_others_what_nobody_holds_is_shared_out():
    nodes = [node("a", 16, 8, free=(15, 8))]
    assert (
        count_fitting_workers(
            compute_allocation(config(), nodes), nodes, worker_node_ids=[]
        )
        == 7
    )
    beside = compute_allocation(config(), nodes, only_available=True)
    assert beside == Allocation(1, 8, 1, 1)
    assert count_fitting_workers(beside, nodes, worker_node_ids=[]) == 8


def test_idle_gpus_are_those_that_nobody_holds():
    nodes = [node("a", 16, 8, free=(4, 2))]
    share = compute_allocation(config(), nodes, only_available=True)
    assert choose_num_workers(share, nodes) == 2
    assert describe_idle_gpus(config(), share, 2, nodes) is None


def test_room_counts_whole_workers_a_node():
    nodes = [
        node("a", 3.0),
        node("b", 1.0),
        node("c", 0.5),
        ClusterNode("d", "address of d", {}, {}, False),
    ]
    assert count_fitting_workers(Allocation(1, 8, 1, 0), nodes, worker_node_ids=[]) == 4
    assert count_fitting_workers(Allocation(1, 8, 2, 0), nodes, worker_node_ids=[]) == 1
    assert (
        count_fitting_workers(
            Allocation(1, 8, 2, 1),
            [node("a", 16, 4), node("b", 2, 8)],
            worker_node_ids=[],
        )
        == 4 + 1
    )


def test_our_own_workers_count_and_those_on_a_draining_node_do_not():
    nodes = [
        node("a", 8, free=(0, 0)),
        node("b", 8, free=(0, 0), draining=True),
        node("c", 8, free=(1, 0)),
    ]
    assert (
        count_fitting_workers(
            Allocation(1, 8, 1, 0), nodes, worker_node_ids=["a", "a", "b"]
        )
        == 3
    )


def test_what_is_missing_is_named():
    nodes = [
        node("a", 8, 2, free=(3, 0)),
        node("b", 8, 2, free=(1, 0)),
        node("c", 8, 2, draining=True),
    ]
    gpus = Allocation(8, 8, 1, 1)
    assert (
        explain_shortage(gpus, nodes)
        == "the run needs 8 GPUs (at least 8 workers with 1 each), but the cluster has 4"
    )
    cpus = Allocation(9, 9, 2, 0)
    assert (
        explain_shortage(cpus, nodes)
        == "the run needs 18 CPUs (at least 9 workers with 2 each), but the cluster has 16"
    )
    held = (
        "the run needs at least 9 workers, but only 4 fit beside the other jobs on the "
        "cluster"
    )
    assert explain_shortage(Allocation(9, 9, 1, 0), nodes) == held


@pytest.mark.parametrize(
    ("changes", "cpus", "gpus", "found"),
    [
        ({}, 16, 4, 4),
        ({}, 16, 0, 16),
        ({"cpus_per_worker": 8}, 16, 4, 2),
        ({"device": "cpu"}, 16, 4, 16),
        ({}, 2, 4, 2),
    ],
)
def test_workers_of_a_kind_of_node(changes, cpus, gpus, found):
    assert count_workers_per_node(config(**changes), cpus, gpus) == found


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 1), (1, 1), (3, 3), (8, 8)])
def test_this_machine(monkeypatch, gpus, ranks):
    """torch counts what CUDA_VISIBLE_DEVICES leaves."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("distrain.launch.local.count_available_cores", lambda: 16)
    assert get_local_node().total_resources == {"CPU": 16.0, "GPU": float(gpus)}
    assert count_local_ranks(config()) == ranks
    assert count_local_ranks(config(device="cpu")) == 1
    assert count_local_ranks(config(workers=[1, 2], device="cpu")) == 2


def test_a_dry_run_describes_it():
    settings, nodes = config(4), machine(8)
    assert describe_allocation(
        settings, compute_allocation(settings, nodes), nodes, is_elastic=True
    ) == {
        "workers": "4, each with a GPU and 2 CPU cores, 1 to 4 as the cluster changes",
        "available": "8 GPUs and 16 CPU cores on 1 node",
        "idle": "4 of 8 GPUs stay idle: a run has at most virtual_workers = 4 workers "
        "(fixed for the whole run)",
    }
    settings, nodes = config(), machine(0, 1)
    assert describe_allocation(
        settings, compute_allocation(settings, nodes), nodes, is_elastic=False
    ) == {
        "workers": "1, each with no GPU and 1 CPU core",
        "available": "0 GPUs and 1 CPU core on 1 node",
    }
