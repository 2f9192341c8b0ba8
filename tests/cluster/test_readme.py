"""What the READMEs show for Ray clusters, with their recipes, on real hosts."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hosts import HEAD
from photos import write_photos
from readme_commands import SMALL, shown, write_recipe
from waiting import await_that

import distrain
from distrain.monitor.sinks import SilentConsole

pytestmark = [pytest.mark.cluster, pytest.mark.namespaces]


class Site(NamedTuple):
    """A folder that all hosts share, with packed images and the README's recipe."""

    folder: Path
    recipe: dict[str, str]
    """Where `my.yaml` is."""
    overrides: tuple[str, ...]
    """They cut the recipe to one step, and name the images."""
    weights: str
    """What that ends with in one process, as it is printed."""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    write_photos(folder)
    for split in ("train", "val"):
        distrain.pack(str(folder / "photos" / split), str(folder / "shards" / split))
    path = write_recipe(folder)
    data = [f"data.{split}={folder}/shards/{split}" for split in ("train", "val")]
    alone = distrain.load_config(path, [*SMALL, *data, f"run={folder}/alone"])
    weights = distrain.train(alone, console=SilentConsole()).weights[:16]
    return Site(folder, {"my.yaml": str(path)}, (*SMALL, *data), weights)


def test_workers_on_one_machine_with_a_ray_of_its_own(start, site, hosts):
    """And nothing of it is left: no process, no shared memory, no session."""
    sessions = set(Path("/tmp").glob("distrain-ray-*"))
    _, *words = shown("distrain train my.yaml --workers 2", site.recipe)
    run = start.distrain("client", *words, *site.overrides)
    assert run.weights() == site.weights
    assert "worker group formed: 2 workers" in run.text
    await_that(
        lambda: len(hosts.pids("client", "")) == 2,
        "all but the host's init and its sleep to end",
    )
    assert hosts.shared_memory("client") == []
    assert set(Path("/tmp").glob("distrain-ray-*")) == sessions


def test_a_client_outside_the_cluster(start, site, hosts):
    places = {**site.recipe, "ray://head": f"ray://{hosts.address[HEAD]}"}
    _, *words = shown("distrain train my.yaml --address ray://head:10001", places)
    run = start.distrain("client", *words, *site.overrides)
    assert run.weights() == site.weights


def test_members_of_the_cluster(start, site, tmp_path):
    """One says by options, and one by its recipe, how many workers it may have."""
    _, *words = shown(
        "distrain train my.yaml --workers 1-8 --address auto", site.recipe
    )
    run = start.distrain(HEAD, *words, *site.overrides)
    assert run.weights() == site.weights

    recipe = {"my.yaml": str(write_recipe(tmp_path, "cluster/README.md"))}
    _, *words = shown("distrain train my.yaml --address auto", recipe)
    cut = [item for item in site.overrides if "drop_epochs" not in item]
    cut += ["cluster.gpus_per_worker=0", "cluster.cpus_per_worker=1"]
    run = start.distrain("n2", *words, *cut, f"run={tmp_path}/other")
    assert run.weights() == site.weights


@pytest.fixture
def ssh_login(hosts, tmp_path) -> Iterator[Path]:
    """An SSH server on the head; the client's configuration, with which `ssh` logs in there."""
    for key in ("host", "user"):
        command = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f")
        subprocess.run([*command, str(tmp_path / key)], check=True)
    server = tmp_path / "sshd_config"
    server.write_text(
        f"HostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\n"
        "StrictModes no\nPidFile none\n"
    )
    client = tmp_path / "ssh_config"
    client.write_text(
        f"IdentityFile {tmp_path}/user\nStrictHostKeyChecking no\nExitOnForwardFailure yes\n"
        f"UserKnownHostsFile {tmp_path}/known_hosts\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    log = tmp_path / "sshd.log"
    with log.open("w") as stderr:
        command = ("/usr/sbin/sshd", "-D", "-e", "-f", str(server))
        sshd = hosts.popen(HEAD, *command, stderr=stderr)
    await_that(lambda: "Server listening" in log.read_text(), "the SSH server to start")
    yield client
    hosts.kill(HEAD, "/usr/sbin/sshd")
    sshd.wait()


def test_the_dashboard_through_a_tunnel(hosts, ssh_login):
    """Its port is the one that distrain looks for on the same machine."""
    address = hosts.address[HEAD]
    ssh, *words = shown(
        "ssh -L 8265:127.0.0.1:8265 HEAD", {"127.0.0.1": address, "HEAD": address}
    )
    # -N: no shell. The tests' dashboard does not listen on loopback.
    tunnel = hosts.popen("client", ssh, "-F", str(ssh_login), "-N", *words)
    try:
        # Nothing else listens at that port there; distrain waits until the tunnel does.
        assert "error:" not in hosts.run("client", "distrain", "jobs")
    finally:
        hosts.kill("client", "ssh -F")
        tunnel.wait()


def test_a_job_is_submitted_followed_stopped_and_resumed(start, site, hosts):
    """The session that cluster/README.md shows, on a host outside the cluster."""
    url = f"http://{hosts.address[HEAD]}:8265"
    known = {"environment": {"RAY_API_SERVER_ADDRESS": url}}
    job, directory = {"ID": "shown"}, f"{site.folder}/lasting"
    lasting = (
        *site.overrides,
        f"run={directory}",
        "epochs=1000000",
        "log.every=10",
        "checkpoint.every=1000",
        "evaluate.every=1000000",
        "--id=shown",
    )

    # Start it; what is submitted again is not started twice.
    places = {**site.recipe, "http://head:8265": url}
    _, *words = shown("distrain submit my.yaml --address http://head:8265 -f", places)
    followed = start.distrain("client", *words, *lasting)
    followed.wait_for_step(10)
    places = {**site.recipe, "http://HEAD:8265": url}
    _, *words = shown("distrain submit my.yaml --address http://HEAD:8265", places)
    again = start.distrain("client", *words, *lasting).end()
    assert "job shown is already queued or running" in again

    # List it, and follow it from a second terminal.
    _, *words = shown(
        "distrain jobs --address http://head:8265", {"http://head:8265": url}
    )
    assert re.search("shown +RUNNING", start.distrain("client", *words).end())
    _, *words = shown("distrain logs ID -f", job)
    log = start.distrain("client", *words, **known)
    log.wait_for("step ")

    # Stop it, resume it, and stop it again.
    _, *words = shown("distrain stop ID", job)
    stopped = start.distrain("client", *words, **known).end()
    assert f"to resume: distrain resume {directory}" in stopped
    assert "stopped and saved after step" in log.end(143)
    assert "stopped and saved after step" in followed.end(143)
    _, *words = shown(
        "distrain resume s3://bucket/runs/my -f", {"s3://bucket/runs/my": directory}
    )
    resumed = start.distrain("client", *words, **known)
    resumed.wait_for("resumed from step")
    (new_job,) = re.findall(r"job (\S+) submitted", resumed.text)
    start.distrain("client", "stop", new_job, **known).end()
    resumed.end(143)
