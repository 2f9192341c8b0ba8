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

from distrain.launch.kuberay import manifests

pytestmark = [pytest.mark.cluster, pytest.mark.namespaces]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def distrain(start, hosts, recipe):
    """Runs a command of distrain's on the client; jobs that are left are ended."""
    address = f"--address=http://{hosts.address[HEAD]}:8265"

    def command(name, *arguments, config=recipe, **options):
        what = (str(start.written(config)),) if name == "submit" else ()
        return start.distrain("client", name, *what, *arguments, address, **options)

    yield command
    listed = command("jobs").end()
    for job in re.findall(r"(\S+) +(?:RUNNING|PENDING)", listed):
        command("stop", job).end()


def test_submit_and_follow_as_if_it_ran_here(distrain, wanted, recipe, hosts):
    run = distrain("submit", "-f", "--workers=3", "--id=first")
    assert run.weights() == wanted()
    assert "job first submitted" in run.text
    assert "worker group formed: 3 workers" in run.text
    assert re.search(r"epoch 0  step 20/235  loss", run.text), "lines as in local mode"
    assert "{" not in run.text
    assert re.search(rf"first +SUCCEEDED +\S+ \S+ +{recipe.run}", distrain("jobs").end())
    assert f"weights   {wanted()}" in distrain("logs", "first").end()
    (log,) = Path(recipe.run).glob("log-*.txt")
    assert f"weights   {wanted()}" in log.read_text(), "it is there when the cluster is gone"
    again = distrain("submit", "-f", "--workers=3").end()
    assert "is finished: all 235 steps are done" in again


def test_ctrl_c_detaches_a_cut_is_survived_stop_saves_and_resume_goes_on(distrain, wanted, recipe, longer, hosts):
    run = distrain("submit", "-f", "--workers=2", "--id=mine", config=longer)
    run.wait_for_step(40)
    (pid,) = hosts.pids("client", "-m distrain submit")
    os.kill(pid, signal.SIGINT)
    text = run.end(130)
    assert "the job goes on. To come back: distrain logs mine -f" in text
    assert re.search(r"mine +RUNNING", distrain("jobs").end())

    back = distrain("submit", "-f", "--workers=2", "--id=mine", config=longer)
    back.wait_for("job mine is at work already")
    back.wait_for_step(60)
    hosts.refuse("client", 8265)
    cut = back.wait_for("the connection to the cluster is lost")
    hosts.refuse("client", None)
    connected = back.wait_for("connected again", since=cut)
    back.wait_for(r"step \d+/1128", since=connected)

    stopped = distrain("stop", "mine").end()
    assert f"to go on: distrain resume {recipe.run}" in stopped
    text = back.end(143)
    assert "stopped and saved after step" in text
    steps = [int(step) for step in re.findall(r"  step (\d+)/", text)]
    stopped_after = steps.pop()  # the last line is of the step that it was stopped after
    assert steps == [*range(20, stopped_after, 20)], "each line once"
    resumed = distrain("resume", recipe.run, "-f")
    assert resumed.weights() == wanted(longer)
    assert "resumed from step" in resumed.text


def test_a_job_that_fails_ends_with_its_own_code(distrain):
    run = distrain("submit", "-f", "data.train=/nowhere/at/all", "--id=fails")
    assert "no data set at /nowhere/at/all" in run.end(2)


def test_a_job_that_can_never_fit_says_what_is_missing(distrain):
    run = distrain("submit", "-f", "--workers=2", "cluster.cpus_per_worker=4", "cluster.wait=5", "--id=large")
    text = run.end(1)
    assert "waiting for the cluster: the run asks for 8 CPUs (2 workers of 4), and the cluster has 3" in text
    assert "error: the run asks for 8 CPUs (2 workers of 4), and the cluster has 3: add nodes" in text


def test_what_cannot_be_reached_is_one_sentence(start, hosts, recipe):
    path, good = str(start.written(recipe)), f"http://{hosts.address[HEAD]}:8265"
    for options, address, sentence in (
        ({"environment": {"RAY_AUTH_TOKEN": "0" * 64}}, good, "wants a token"),
        ({}, f"http://{hosts.address['n2']}:8265", "no Ray cluster answers at"),
    ):
        text = start.distrain("client", "submit", path, f"--address={address}", **options).end(2)
        assert sentence in text
        assert len(text.splitlines()) == 1 + ("does not answer yet: asking for 30 s" in text), "one line"


def test_what_kuberay_is_given_runs(distrain, start, hosts, wanted, recipe, tmp_path):
    """As the operator's submitter hands it to Ray; the pods' folder is one of this machine's."""
    found = manifests(recipe, ROOT / "cluster/kuberay/rayjob.yaml", job="as-a-rayjob")
    folder = tmp_path / "pod"
    folder.mkdir()
    for name, text in found.files["data"].items():
        (folder / name).write_text(text)
    spec = json.loads(json.dumps(found.job["spec"]).replace("/etc/distrain", str(folder)))
    environment = json.dumps(yaml.safe_load(spec["runtimeEnvYAML"]))
    where = ("--address", f"http://{hosts.address[HEAD]}:8265", "--submission-id", spec["jobId"])
    what = ("--runtime-env-json", environment, "--metadata-json", json.dumps(spec["metadata"]))
    process = hosts.popen(
        "client", RAY, "job", "submit", *where, *what, "--", *shlex.split(spec["entrypoint"]), stdout=-1, stderr=-2
    )
    said = process.communicate(timeout=180)[0]
    assert process.returncode == 0, said
    assert f"weights   {wanted()}" in said
    assert re.search(rf"as-a-rayjob +SUCCEEDED +\S+ \S+ +{recipe.run}", distrain("jobs").end())
