"""Jobs from a host that is no member of the cluster, which asks for a token."""

import json
import os
import re
import shlex
import signal
from pathlib import Path

import pytest
import yaml
from hosts import HEAD, RAY
from waiting import PATIENCE

from distrain.launch.kuberay import build_manifests

pytestmark = [pytest.mark.cluster, pytest.mark.namespaces]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def distrain(start, hosts, recipe):
    """Runs a command of distrain's on the client; jobs that are left are ended."""
    address = f"--address=http://{hosts.address[HEAD]}:8265"

    def command(name, *arguments, config=recipe, **options):
        what = (start.written(config),) if name == "submit" else ()
        return start.distrain("client", name, *what, *arguments, address, **options)

    yield command
    listed = command("jobs").end()
    for job in re.findall(r"(\S+) +(?:RUNNING|PENDING)", listed):
        command("stop", job).end()


def test_submit_and_follow_as_if_it_ran_here(distrain, wanted, recipe, hosts):
    run = distrain("submit", "-f", "--workers=3", "--id=first")
    assert run.weights() == wanted
    assert "job first submitted" in run.text
    assert "worker group formed: 3 workers" in run.text
    assert re.search(r"epoch 0  step 20/94  loss", run.text), "lines as in local mode"
    assert "{" not in run.text
    assert re.search(
        rf"first +SUCCEEDED +\S+ \S+ +{recipe.run}", distrain("jobs").end()
    )
    assert f"weights   {wanted}" in distrain("logs", "first").end()
    (log,) = Path(recipe.run).glob("log-*.txt")
    assert f"weights   {wanted}" in log.read_text(), (
        "it is there when the cluster is gone"
    )


def test_ctrl_c_detaches_a_cut_is_survived_stop_saves_and_resume_goes_on(
    distrain, paced, reference, hosts
):
    run = distrain("submit", "-f", "--workers=1", "--id=mine", config=paced)
    run.wait_for_step(10)
    (pid,) = hosts.pids("client", "-m distrain submit")
    os.kill(pid, signal.SIGINT)
    text = run.end(130)
    assert "the job keeps running; to follow it again: distrain logs mine -f" in text
    assert re.search(r"mine +RUNNING", distrain("jobs").end())

    back = distrain("submit", "-f", "--workers=1", "--id=mine", config=paced)
    back.wait_for("job mine is already queued or running")
    back.wait_for("step ")
    hosts.refuse("client", 8265)
    cut = back.wait_for("lost the connection to the cluster")
    hosts.refuse("client", None)
    connected = back.wait_for("reconnected", since=cut)
    back.wait_for(r"step \d+/", since=connected)

    stopped = distrain("stop", "mine").end()
    assert f"to resume: distrain resume {paced.run}" in stopped
    text = back.end(143)
    assert "stopped and saved after step" in text
    steps = [int(step) for step in re.findall(r"  step (\d+)/", text)]
    stopped_after = (
        steps.pop()
    )  # the last line is of the step that it was stopped after
    assert steps == [*range(10, stopped_after, 10)], "each line once"
    resumed = distrain("resume", paced.run, "-f")
    resumed.wait_for(f"resumed from step {stopped_after}")
    reference.check(resumed, paced)


def test_what_goes_wrong_is_one_sentence(distrain, start, hosts, recipe):
    """Side by side: most of it is waiting for a while, in case that it comes right."""
    large = (
        "submit",
        "-f",
        "--workers=2",
        "cluster.cpus_per_worker=4",
        "cluster.wait=5",
        "--id=large",
    )
    path = start.written(recipe)
    runs = {
        "fails": distrain(
            "submit", "-f", "--workers=1", "data.train=/nowhere/at/all", "--id=fails"
        ),
        "large": distrain(*large),
        "nobody": start.distrain(
            "client", "submit", path, f"--address=http://{hosts.address['n2']}:8265"
        ),
        "stranger": distrain("submit", environment={"RAY_AUTH_TOKEN": "0" * 64}),
    }
    assert "no data set at /nowhere/at/all" in runs["fails"].end(2), "its own code"
    text = runs["large"].end(1)
    assert (
        "waiting for the cluster: the run needs 8 CPUs (at least 2 workers with 4 each), but the cluster has 3"
        in text
    )
    assert (
        "error: the run needs 8 CPUs (at least 2 workers with 4 each), but the cluster has 3: add nodes"
        in text
    )
    for name, sentence in (
        ("stranger", "requires a token"),
        ("nobody", "no Ray cluster answers at"),
    ):
        text = runs[name].end(2)
        assert sentence in text
        assert len(text.splitlines()) == 1 + (
            "does not answer yet: retrying for 30 s" in text
        ), "one line"


def test_what_kuberay_is_given_runs(distrain, start, hosts, wanted, recipe, tmp_path):
    """As the operator's submitter hands it to Ray; the pods' folder is one of this machine's."""
    alone = recipe.model_copy(
        update={"cluster": recipe.cluster.model_copy(update={"workers": (1, 1)})}
    )
    found = build_manifests(
        alone, ROOT / "cluster/kuberay/rayjob.yaml", job_name="as-a-rayjob"
    )
    folder = tmp_path / "pod"
    folder.mkdir()
    for name, text in found.config_map["data"].items():
        (folder / name).write_text(text)
    spec = json.loads(
        json.dumps(found.ray_job["spec"]).replace("/etc/distrain", str(folder))
    )
    environment = json.dumps(yaml.safe_load(spec["runtimeEnvYAML"]))
    where = (
        "--address",
        f"http://{hosts.address[HEAD]}:8265",
        "--submission-id",
        spec["jobId"],
    )
    what = (
        "--runtime-env-json",
        environment,
        "--metadata-json",
        json.dumps(spec["metadata"]),
    )
    process = hosts.popen(
        "client",
        RAY,
        "job",
        "submit",
        *where,
        *what,
        "--",
        *shlex.split(spec["entrypoint"]),
        stdout=-1,
        stderr=-2,
    )
    said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, said
    assert f"weights   {wanted}" in said
    assert re.search(
        rf"as-a-rayjob +SUCCEEDED +\S+ \S+ +{recipe.run}", distrain("jobs").end()
    )
