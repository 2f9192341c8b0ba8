import pytest
import ray

from distrain.launch import ray_cluster
from distrain.launch.ray_cluster import call_for
from distrain.launch.share import Node, Share

BUSY = "RuntimeError: Starting Ray client server failed. See ray_client_server_23000.err for detailed logs."


ZOMBIE = "psutil.ZombieProcess: PID still exists but it's a zombie (pid=1418)"


@pytest.mark.parametrize("text", [BUSY, ZOMBIE])
@pytest.mark.parametrize("kind", [RuntimeError, ConnectionAbortedError])
def test_a_busy_head_is_asked_twice_and_others_once(console, monkeypatch, kind, text):
    """What Ray says after 30 s in which its head did not start a server for the client."""
    calls = []

    def init(error, times):
        def refuse(**options):
            calls.append(options)
            if len(calls) <= times:
                raise error

        return refuse

    monkeypatch.setattr(ray, "init", init(kind(f"Initialization failure from server:\n{text}"), 1))
    ray_cluster._join("ray://head:10001", console, {})
    assert [call["address"] for call in calls] == ["ray://head:10001"] * 2
    assert console.events == ["the head is too busy to serve this client: asking again"]
    calls.clear()
    monkeypatch.setattr(ray, "init", init(RuntimeError("something else"), 1))
    with pytest.raises(RuntimeError, match="something else"):
        ray_cluster._join("ray://head:10001", console, {})
    assert len(calls) == 1


def node(name, cpus, gpus):
    return Node(name, f"address of {name}", {"CPU": 8.0, "GPU": 2.0}, {"CPU": cpus, "GPU": gpus}, draining=False)


@pytest.fixture
def asked(monkeypatch):
    """What the autoscaler is asked for."""
    found = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: found.append(bundles))
    return found


def test_an_autoscaler_is_asked_for_whole_workers(asked):
    call_for(Share(1, 2, 4, 1), 2, [], [])
    call_for(Share(1, 2, 1, 0), 0, [node("a", 0.0, 0.0)], [])
    assert asked == [[{"CPU": 4.0, "GPU": 1.0}] * 2, []]


def test_an_autoscaler_is_asked_for_what_others_hold_too(asked):
    """It takes what it is asked for as the size of the whole cluster."""
    nodes = [node("a", 1.0, 2.0), node("b", 6.0, 0.0), node("c", 8.0, 2.0)]
    call_for(Share(1, 3, 2, 0), 3, nodes, held=["a", "b"])
    ours, others = {"CPU": 2.0, "GPU": 0.0}, [{"CPU": 5.0, "GPU": 0.0}, {"CPU": 0.0, "GPU": 2.0}]
    assert asked == [[ours] * 3 + others]
