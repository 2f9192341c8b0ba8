"""The same weights on any cluster: a Ray of its own, a client of one, and a run that cannot go on."""

import re
import shutil
from pathlib import Path

import pytest
from hosts import HEAD
from waiting import await_that

pytestmark = pytest.mark.cluster


@pytest.mark.namespaces
def test_workers_on_one_machine_with_a_ray_of_its_own(start, wanted, hosts):
    """And nothing of it is left: no process, no shared memory, no session."""
    sessions = set(Path("/tmp").glob("distrain-ray-*"))
    run = start("--workers=3", host="client", address=None)
    assert run.weights() == wanted
    assert "worker group formed: 3 workers" in run.text
    await_that(
        lambda: len(hosts.pids("client", "")) == 2,
        "all but the host's init and its sleep to end",
    )
    assert hosts.shared_memory("client") == []
    assert set(Path("/tmp").glob("distrain-ray-*")) == sessions


@pytest.mark.namespaces
def test_a_client_outside_the_cluster(start, wanted, hosts):
    run = start(
        "--workers=2", host="client", address=f"ray://{hosts.address[HEAD]}:10001"
    )
    assert run.weights() == wanted


def test_a_run_that_makes_no_progress_ends_with_the_first_cause(
    start, digits, tmp_path
):
    shutil.copytree(digits / "train", tmp_path / "damaged")
    shard = next((tmp_path / "damaged").glob("*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    text = start(
        "--workers=1", f"data.train={tmp_path}/damaged", "cluster.max_failures=2"
    ).end(1)
    assert text.count("worker group formed") == 3
    assert (
        "error: 2 attempts in a row failed after step 0 without a new checkpoint"
        in text
    )
    assert re.search(
        r"the first failure was: lost rank \d on [\d.]+: .*parquet is damaged: bytes",
        text,
    )
    assert "Traceback" not in text
