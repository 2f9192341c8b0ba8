"""With how many workers a run starts, while its cluster comes up and changes. Ray and the clock are stand-ins."""

import threading
from types import SimpleNamespace

import pytest

from distrain.config import parse_config
from distrain.errors import RunError
from distrain.launch import ray_driver
from distrain.launch.allocation import Allocation, ClusterNode
from distrain.launch.ray_driver import _RayDriver

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
def driver(monkeypatch, console):
    """Makes a driver that sees these nodes from these seconds on; `driver.now` is its clock."""

    def make(seen, *, gpus=None, **cluster):
        found = object.__new__(_RayDriver)
        found.now = 0.0

        def look(_):
            return next(nodes for since, nodes in reversed(seen) if found.now >= since)

        def sleep(seconds):
            found.now += seconds

        remote = SimpleNamespace(remote=lambda *_: None)
        monkeypatch.setattr(
            ray_driver,
            "time",
            SimpleNamespace(monotonic=lambda: found.now, sleep=sleep),
        )
        monkeypatch.setattr(ray_driver.ray, "get", look)
        found._config = parse_config({**BASE, "cluster": cluster}, "test")
        found._console, found._stop_event = console, threading.Event()
        found._mailbox = SimpleNamespace(
            list_nodes=remote, request_workers=remote, send_message=remote
        )
        found._allocation = found._unplaceable_workers = found._requested_at = None
        found._rank_nodes, found._logged_messages, found._gpus_per_worker = (
            [],
            set(),
            gpus,
        )
        found._awaits_stable_cluster = found._config.cluster.workers == "auto"
        return found

    return make


def test_gpus_that_come_up_late_are_waited_for_and_used(driver, console):
    """A head alone, as in a cluster that comes up; then one node after another."""
    found = driver([(0, [HEAD]), (1, [HEAD, A]), (3, [HEAD, A, B])])
    assert found._wait_for_capacity() == (16, Allocation(1, 16, 2, 1))
    assert 6 <= found.now < 7, "three seconds after the last one"
    assert console.events == []


def test_a_cluster_without_gpus_has_one_rank(driver):
    found = driver([(0, [node("a", 4, 0), node("b", 4, 0)])])
    assert found._wait_for_capacity() == (1, Allocation(1, 1, 4, 0))


def test_a_number_of_workers_starts_at_once(driver):
    found = driver([(0, [HEAD, A])], workers=[2, 4])
    assert found._wait_for_capacity() == (4, Allocation(2, 4, 2, 1))
    assert found.now == 0


def test_a_run_on_gpus_waits_for_them_and_starts_at_once_when_they_are_back(
    driver, console
):
    found = driver(
        [(0, [node("other", 64, 0)]), (100, [node("other", 64, 0), B])], gpus=1
    )
    assert found._wait_for_capacity() == (8, Allocation(1, 8, 2, 1))
    assert 100 <= found.now < 101
    (event,) = console.events
    assert event.startswith(
        "waiting for the cluster: the run asks for 1 GPU (1 worker of 1), and"
    )


def test_it_does_not_wait_for_ever(driver):
    found = driver([(0, [HEAD])], gpus=1, wait=20.0)
    with pytest.raises(RunError, match="the run asks for 1 GPU"):
        found._wait_for_capacity()
    assert 20 <= found.now < 21


def test_groups_that_never_form_end_the_run(driver, monkeypatch):
    """Each loss before a group has formed counts; one after that does not."""
    found = driver([(0, [A])], max_failures=2)
    (
        found._formed_since_failure,
        found._num_failed_starts,
        found._failure_causes,
        found._interrupted_at,
        found._placement_group,
    ) = (
        True,
        0,
        [],
        None,
        None,
    )
    told = iter([{0: "killed"}, {0: "no GPU"}, {1: "no GPU"}])
    stopped = threading.Event()
    monkeypatch.setattr(
        ray_driver, "build_trainer", lambda *_: SimpleNamespace(fit=stopped.wait)
    )
    found._rank_options, found._fit_number = {}, 0
    found._handle_messages = lambda wait: found._on_ranks_lost(next(told))
    sentence = "no worker group could be formed, 2 times in a row; the first cause was: lost rank 0"
    with pytest.raises(RunError, match=sentence):
        found._run_one_fit(1, Allocation(1, 1, 1, 1))
    stopped.set()
