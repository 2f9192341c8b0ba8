import socket
from contextlib import closing

import pytest
import ray

from distrain.errors import UserError
from distrain.launch import ray_cluster
from distrain.launch.allocation import Allocation, ClusterNode
from distrain.launch.drain import drain
from distrain.launch.ray_cluster import connect_to_ray, request_workers

FAILED = "RuntimeError: Starting Ray client server failed. See ray_client_server_23000.err for detailed logs."
ZOMBIE = "psutil.ZombieProcess: PID still exists but it's a zombie (pid=1418)"


@pytest.fixture
def refused(monkeypatch):
    """Make Ray refuse to connect a number of times; returns the addresses that it was asked for."""

    def refuse(error, times):
        asked = []

        def init(*, address):
            asked.append(address)
            if len(asked) <= times:
                raise error

        monkeypatch.setattr(ray, "init", init)
        return asked

    return refuse


@pytest.mark.parametrize("text", [FAILED, ZOMBIE])
@pytest.mark.parametrize("kind", [RuntimeError, ConnectionAbortedError])
def test_a_head_whose_client_server_fails_is_asked_again(console, refused, kind, text):
    asked = refused(kind(f"Initialization failure from server:\n{text}"), 2)
    ray_cluster._connect_with_retries("ray://head:10001", console, {})
    assert asked == ["ray://head:10001"] * 3
    assert len(console.events) == 2
    assert "GRPC_ENABLE_FORK_SUPPORT=0" in console.events[0]


@pytest.mark.parametrize(("text", "times"), [(FAILED, 4), ("something else", 1)])
def test_what_fails_for_good_is_raised(console, refused, text, times):
    asked = refused(RuntimeError(text), 100)
    with pytest.raises(RuntimeError, match=text):
        ray_cluster._connect_with_retries("ray://head:10001", console, {})
    assert len(asked) == times


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_an_address_where_nobody_listens_fails_before_ray_tries(
    console, refused, monkeypatch, form
):
    """Ray would try for over a minute, and print lines of its own."""
    monkeypatch.setattr(ray_cluster, "_PROBE_SECONDS", 0.2)
    asked = refused(RuntimeError("Ray was asked"), 100)
    # Bound, so that nobody else takes it, and not listened on.
    with closing(socket.socket()) as bound:
        bound.bind(("127.0.0.1", 0))
        address = form.format(f"127.0.0.1:{bound.getsockname()[1]}")
        message = (
            rf"no Ray cluster answers at {address} \(.*Connection refused\): check"
        )
        with pytest.raises(UserError, match=message), connect_to_ray(address, console):
            pass
    assert asked == []
    assert console.events == [
        f"connecting to the Ray cluster at {address}",
        f"{address} does not answer yet: retrying for 0 s",
    ]


def test_a_head_that_is_starting_is_tried_again(console, monkeypatch):
    refusals = [ConnectionRefusedError("refused")] * 2
    monkeypatch.setattr(
        ray_cluster,
        "_probe_address",
        lambda _: (_ for _ in ()).throw(refusals.pop()) if refusals else None,
    )
    asked = []
    monkeypatch.setattr(ray, "init", lambda address, **_: asked.append(address))
    monkeypatch.setattr(ray, "nodes", list)
    with connect_to_ray("head:6379", console):
        assert asked == ["head:6379"]
    assert sum("retrying for 15 s" in event for event in console.events) == 1


@pytest.mark.parametrize("address", [None, "auto"])
def test_a_connection_of_the_callers_own_is_left_alone(console, monkeypatch, address):
    closed = []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "shutdown", lambda: closed.append(True))
    message = r"already connected to a Ray cluster: call ray.shutdown\(\) first"
    with pytest.raises(UserError, match=message), connect_to_ray(address, console):
        pass
    with pytest.raises(UserError, match=message):
        drain()
    assert closed == []


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_an_address_where_somebody_listens_is_rays(console, monkeypatch, form):
    asked = []
    monkeypatch.setattr(ray, "init", lambda address, **_: asked.append(address))
    monkeypatch.setattr(ray, "nodes", list)
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        address = form.format(f"127.0.0.1:{server.getsockname()[1]}")
        with connect_to_ray(address, console):
            assert asked == [address]


def node(name, cpus, gpus):
    return ClusterNode(
        name,
        f"address of {name}",
        {"CPU": 8.0, "GPU": 2.0},
        {"CPU": cpus, "GPU": gpus},
        draining=False,
    )


@pytest.fixture
def asked(monkeypatch):
    """What the autoscaler is asked for."""
    found = []
    monkeypatch.setattr(
        "ray.autoscaler.sdk.request_resources", lambda bundles: found.append(bundles)
    )
    return found


def test_an_autoscaler_is_asked_for_whole_workers(asked):
    request_workers(Allocation(1, 2, 4, 1), 2, [], [])
    request_workers(Allocation(1, 2, 1, 0), 0, [node("a", 0.0, 0.0)], [])
    assert asked == [[{"CPU": 4.0, "GPU": 1.0}] * 2, []]


def test_an_autoscaler_is_asked_for_what_others_hold_too(asked):
    """It takes what it is asked for as the size of the whole cluster."""
    nodes = [node("a", 1.0, 2.0), node("b", 6.0, 0.0), node("c", 8.0, 2.0)]
    request_workers(Allocation(1, 3, 2, 0), 3, nodes, worker_node_ids=["a", "b"])
    ours, others = (
        {"CPU": 2.0, "GPU": 0.0},
        [{"CPU": 5.0, "GPU": 0.0}, {"CPU": 0.0, "GPU": 2.0}],
    )
    assert asked == [[ours] * 3 + others]


def test_what_is_replaced_in_ray_comes_back(console, monkeypatch):
    original, during = ray._private.worker.print_to_stdstream, []
    monkeypatch.setattr(
        ray, "init", lambda **_: during.append(ray._private.worker.print_to_stdstream)
    )
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with connect_to_ray("auto", console):
        assert during != [original]
    assert ray._private.worker.print_to_stdstream is original
