import pytest
import ray

from distrain.launch import ray_cluster

BUSY = "RuntimeError: Starting Ray client server failed. See ray_client_server_23000.err for detailed logs."


@pytest.mark.parametrize("kind", [RuntimeError, ConnectionAbortedError])
def test_a_busy_head_is_asked_twice_and_others_once(console, monkeypatch, kind):
    """What Ray says after 30 s in which its head did not start a server for the client."""
    calls = []

    def init(error, times):
        def refuse(**options):
            calls.append(options)
            if len(calls) <= times:
                raise error

        return refuse

    monkeypatch.setattr(ray, "init", init(kind(f"Initialization failure from server:\n{BUSY}"), 1))
    ray_cluster._join("ray://head:10001", console, {})
    assert [call["address"] for call in calls] == ["ray://head:10001"] * 2
    assert console.events == ["the head is too busy to serve this client: asking again"]
    calls.clear()
    monkeypatch.setattr(ray, "init", init(RuntimeError("something else"), 1))
    with pytest.raises(RuntimeError, match="something else"):
        ray_cluster._join("ray://head:10001", console, {})
    assert len(calls) == 1
