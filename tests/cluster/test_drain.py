"""Hosts that say that they will go, and hosts that an autoscaler brings when they are asked for."""

import re

import pytest
from hosts import HEAD, PYTHON, RAY, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.namespaces]

# Ray's own autoscaler, with a provider that starts nodes on the host it runs on.
AUTOSCALER = """
import sys
from ray.cluster_utils import AutoscalingCluster
memory = {"object_store_memory": 150_000_000}
kind = {"resources": {"CPU": 1, **memory}, "node_config": {}, "min_workers": 0, "max_workers": 2}
cluster = AutoscalingCluster({"CPU": 0, **memory}, {"small": kind}, autoscaler_v2=True, idle_timeout_minutes=0.05)
cluster.start()
"""


def test_a_host_that_goes_is_drained(start, hosts, wanted, longer):
    run = start("--workers=1-3", config=longer)
    run.wait_for("worker group formed: 3 workers")
    run.wait_for_step(60)
    drained = start.distrain("n3", "drain", "--seconds=60")
    text = drained.end()
    assert f"{hosts.address['n3']}: nothing new is placed here; waiting for what is at work" in text
    assert f"{hosts.address['n3']}: nobody works here any more" in text
    assert run.told("saving, then going on without losing a step"), "the host waits until it is free"
    assert run.weights() == wanted(longer)
    assert "no step computed again" in run.text
    assert not re.search(rf"lost rank \d+ on {hosts.address['n3']}", run.text)


def test_draining_the_head_stops_its_jobs(start, hosts, recipe, longer):
    address = f"--address=http://{hosts.address[HEAD]}:8265"
    run = start.distrain("client", "submit", str(start.written(longer)), "-f", "--workers=2", "--id=drained", address)
    run.wait_for_step(60)
    text = start.distrain(HEAD, "drain").end()
    assert "drained: asked to save and stop" in text
    assert "stopped and saved after step" in run.end(143)
    assert not hosts.pids(HEAD, "-m distrain train")


def test_a_host_without_ray_has_nothing_to_drain(start):
    text = start.distrain("client", "drain").end(2)
    assert "error: no Ray runs on this host: there is nothing to drain" in text


def test_an_autoscaler_brings_the_workers_that_are_asked_for(start, hosts, wanted, longer, tmp_path):
    script = tmp_path / "autoscaler.py"
    script.write_text(AUTOSCALER)
    try:
        said = hosts.run("client", PYTHON, str(script))
        assert "Ray runtime started" in said, said
        run = start("--workers=1-2", config=longer, host="client")
        run.wait_for("worker group formed: 2 workers")
        assert run.weights() == wanted(longer)

        def nodes() -> int:
            return len(hosts.pids("client", "raylet/raylet"))

        wait_until(lambda: nodes() == 1, "what was brought to be taken away: nothing is asked for any more", 60)
    finally:
        hosts.run("client", RAY, "stop", "--force")
