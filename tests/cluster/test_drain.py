"""A head that says that it will go, and hosts that an autoscaler brings when they are asked for."""

import json
import re
import signal

import pytest
from hosts import HEAD, RAY
from readme_commands import shown
from waiting import PATIENCE, await_that

pytestmark = [pytest.mark.cluster, pytest.mark.namespaces]

# Ray's own autoscaler, with its provider that starts nodes on the host it runs on. Its identity is what Ray's own tests
# of it use.
FAKE_HEAD = "f" * 51 + "00000"
MEMORY = {"object_store_memory": 150_000_000}
AUTOSCALING = {
    "cluster_name": "fake",
    "max_workers": 2,
    # Longer than a worker group takes to start on the nodes that were brought for it, also on a busy machine.
    "idle_timeout_minutes": 0.5,
    "provider": {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "launch_multiple": True,
        "disable_node_updaters": True,
        "head_node_id": FAKE_HEAD,
    },
    "auth": {},
    "file_mounts": {},
    **{
        name: []
        for name in ("setup_commands", "head_setup_commands", "worker_setup_commands")
    },
    **{
        name: []
        for name in (
            "initialization_commands",
            "cluster_synced_files",
            "rsync_exclude",
            "rsync_filter",
        )
    },
    **{name: [] for name in ("head_start_ray_commands", "worker_start_ray_commands")},
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {
            "resources": {"CPU": 0, **MEMORY},
            "node_config": {},
            "max_workers": 0,
        },
        "small": {
            "resources": {"CPU": 1, **MEMORY},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
        },
    },
}
AUTOSCALER = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD,
}


def test_draining_the_head_stops_its_jobs(start, hosts, paced):
    address = f"--address=http://{hosts.address[HEAD]}:8265"
    run = start.distrain(
        "client",
        "submit",
        start.written(paced),
        "-f",
        "--workers=1",
        "--id=drained",
        address,
    )
    run.wait_for_step(10)
    text = start.distrain(HEAD, *shown("distrain drain")[1:]).end()
    assert re.search(
        r"sent SIGTERM to process \d+: it saves a checkpoint and ends\n.*drained, no work is left on this node",
        text,
    )
    assert "stopped and saved after step" in run.end(143)
    assert not hosts.pids(HEAD, "-m distrain train")
    status = start.distrain("client", "jobs", address).end()
    assert re.search("drained +FAILED", status), (
        "so that KubeRay makes a new cluster for it"
    )


def test_a_host_without_ray_has_nothing_to_drain(start):
    text = start.distrain("client", "drain").end(2)
    assert "error: Ray is not running on this host: there is nothing to drain" in text


def test_an_autoscaler_brings_the_workers_that_are_asked_for(
    start, hosts, paced, reference, tmp_path
):
    path = tmp_path / "autoscaling.json"
    path.write_text(json.dumps(AUTOSCALING))
    command = (
        RAY,
        "start",
        "--head",
        f"--autoscaling-config={path}",
        "--num-cpus=0",
        "--disable-usage-stats",
    )
    where = (
        "--node-ip-address",
        hosts.address["client"],
        "--object-store-memory=150000000",
    )
    try:
        process = hosts.popen(
            "client", *command, *where, environment=AUTOSCALER, stdout=-1, stderr=-2
        )
        said = process.communicate(timeout=PATIENCE)[0]
        assert "Ray runtime started" in said, said
        run = start(
            "--workers=1-2", host="client", config=paced
        )  # one worker may start before the second is there
        run.wait_for("worker group formed: 2 workers")
        reference.check(run, paced)
        start.signal(signal.SIGINT, host="client")
        run.end(130)

        def nodes() -> int:
            return len(hosts.pids("client", "raylet/raylet"))

        await_that(
            lambda: nodes() == 1,
            "what was brought to be taken away: nothing is asked for any more",
            PATIENCE,
        )
    finally:
        hosts.run("client", RAY, "stop", "--force")
