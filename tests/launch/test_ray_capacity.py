"""With how many workers a run starts, while its cluster comes up and changes. Ray and the clock are stand-ins."""

import threading
from types import SimpleNamespace

import pytest

from distrain.config import parse_config
from distrain.errors import RunError
from distrain.launch import ray_capacity
from distrain.launch.allocation import Allocation, ClusterNode
from distrain.launch.ray_capacity import CapacityPlanner

BASE = {
    "data": {"train": "x"},
    "schedule": {"name": "constant", "lr": 1.0},
    "global_batch": 64,
    "virtual_workers": 16,
}


def node(name, cpus, gpus):
    has = {"CPU": float(cpus), "GPU": float(gpus)}
    return ClusterNode(name, f"address of {name}", has, has, draining=False)


HEAD, A, B = node("head", 0, 0), node("a", 16, 8), node("b", 16, 8)


@pytest.fixture
def planner(monkeypatch, console):
    """Makes a planner that sees these nodes from these seconds on, and its clock."""

    def make(seen, *, gpus=None, **cluster):
        clock = SimpleNamespace(now=0.0)

        def look(_):
            return next(nodes for since, nodes in reversed(seen) if clock.now >= since)

        def sleep(seconds):
            clock.now += seconds

        remote = SimpleNamespace(remote=lambda *_: None)
        monkeypatch.setattr(
            ray_capacity,
            "time",
            SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep),
        )
        monkeypatch.setattr(ray_capacity.ray, "get", look)
        config = parse_config({**BASE, "cluster": cluster}, "test")
        found = CapacityPlanner(
            config,
            console,
            SimpleNamespace(list_nodes=remote, request_workers=remote),
            threading.Event(),
            awaits_stable_cluster=config.cluster.workers == "auto",
        )
        found.gpus_per_worker = gpus
        return found, clock

    return make


def test_gpus_that_come_up_late_are_waited_for_and_used(planner, console):
    """A head alone, as in a cluster that comes up; then one node after another."""
    found, clock = planner([(0, [HEAD]), (1, [HEAD, A]), (3, [HEAD, A, B])])
    assert found.wait_for_capacity() == (16, Allocation(1, 16, 2, 1))
    assert 6 <= clock.now < 7, "three seconds after the last one"
    assert console.events == []


def test_a_cluster_without_gpus_has_one_rank(planner):
    found, _ = planner([(0, [node("a", 4, 0), node("b", 4, 0)])])
    assert found.wait_for_capacity() == (1, Allocation(1, 1, 4, 0))


def test_a_number_of_workers_starts_at_once(planner):
    found, clock = planner([(0, [HEAD, A])], workers=[2, 4])
    assert found.wait_for_capacity() == (4, Allocation(2, 4, 2, 1))
    assert clock.now == 0


def test_a_run_on_gpus_waits_for_them_and_starts_at_once_when_they_are_back(
    planner, console
):
    found, clock = planner(
        [(0, [node("other", 64, 0)]), (100, [node("other", 64, 0), B])], gpus=1
    )
    assert found.wait_for_capacity() == (8, Allocation(1, 8, 2, 1))
    assert 100 <= clock.now < 101
    (event,) = console.events
    assert event.startswith(
        "waiting for the cluster: the run needs 1 GPU (at least 1 worker with 1 each), but"
    )


def test_it_does_not_wait_for_ever(planner):
    found, clock = planner([(0, [HEAD])], gpus=1, wait=20.0)
    with pytest.raises(RunError, match="the run needs 1 GPU"):
        found.wait_for_capacity()
    assert 20 <= clock.now < 21


def test_what_ray_could_not_place_is_tried_with_fewer(planner):
    found, _ = planner([(0, [HEAD, A])], workers=[2, 4])
    found.on_placement_failed(4)
    assert found.wait_for_capacity()[0] == 3
    found.on_group_formed(["a"] * 3)
    assert found.wait_for_capacity()[0] == 4, "a group has formed since"


def test_a_run_grows_into_room_that_lasts_and_leaves_what_is_drained(planner):
    held = ClusterNode("a", "address of a", A.total_resources, {}, draining=False)
    leaving = ClusterNode("a", "address of a", A.total_resources, {}, draining=True)
    found, clock = planner(
        [(0, [held]), (10, [held, B]), (20, [leaving, B])], workers=[2, 16]
    )
    allocation = Allocation(8, 16, 2, 1)
    found.on_fit_started()
    found.on_group_formed(["a"] * 8)
    assert found.find_resize_reason(8, allocation) is None
    clock.now = 10
    assert found.find_resize_reason(8, allocation) is None, "it may not last"
    clock.now = 13
    reason = found.find_resize_reason(8, allocation)
    assert reason == "there is room for 16 workers, 8 more"
    clock.now = 20
    reason = found.find_resize_reason(8, allocation)
    assert reason == "address of a is being drained"
