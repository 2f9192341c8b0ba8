"""A run's way to Kubernetes: the real kubectl, before a server that plays Kubernetes' API."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kube_api import Api
from readme_commands import shown, write_recipe

from distrain.errors import UserError
from distrain.launch.kuberay import Kubectl, build_manifests
from distrain.monitor.consoles import JsonConsole

TEMPLATE = Path(__file__).parents[2] / "cluster/kuberay/rayjob.yaml"
pytestmark = pytest.mark.cluster


@pytest.fixture
def config(narrow):
    found = narrow(run="s3://bucket/runs/My_Net")
    cluster = found.cluster.model_copy(
        update={"workers": (1, 4), "cpus_per_worker": 4, "gpus_per_worker": 1}
    )
    return found.model_copy(
        update={"cluster": cluster, "virtual_workers": 32, "device": "auto"}
    )


@pytest.fixture
def serve(tmp_path, monkeypatch) -> Iterator[Callable[..., Api]]:
    """Start servers; kubectl knows the last one."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl: .ci/run says where it comes from")
    started = []

    def start(**options) -> Api:
        started.append(Api(**options))
        there = {"name": "there"}
        context = {"cluster": "there", "user": "there", "namespace": "vision"}
        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{**there, "cluster": {"server": started[-1].url}}],
            "users": [{**there, "user": {"token": "secret"}}],
            "contexts": [{**there, "context": context}],
            "current-context": "there",
        }
        (tmp_path / "kubeconfig").write_text(json.dumps(kubeconfig))
        return started[-1]

    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv(
        "HOME", str(tmp_path)
    )  # where kubectl remembers what a server knows
    yield start
    for api in started:
        api.close()


@pytest.fixture
def api(serve) -> Api:
    return serve()


def test_a_run_is_created_once(api, config):
    wanted = build_manifests(config, TEMPLATE)
    assert Kubectl().choose_job_name(wanted) == wanted.job_name
    assert Kubectl().submit_job(wanted) == ("vision", True)
    job, files = api.objects.values()
    assert job["spec"] == wanted.ray_job["spec"]
    assert files["data"] == wanted.config_map["data"]
    owner = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "name": wanted.job_name,
        "uid": job["metadata"]["uid"],
    }
    assert files["metadata"]["ownerReferences"] == [owner]
    assert Kubectl().choose_job_name(wanted) == wanted.job_name
    assert Kubectl().submit_job(wanted) == ("vision", False), "at work already"
    assert len(api.objects) == 2


def test_a_namespace_of_the_template_or_of_the_command(api, config, tmp_path):
    (tmp_path / "site.yaml").write_text(
        TEMPLATE.read_text().replace("metadata:\n", "metadata:\n  namespace: a\n", 1)
    )
    assert Kubectl().submit_job(build_manifests(config, tmp_path / "site.yaml")) == (
        "a",
        True,
    )
    elsewhere = build_manifests(config, tmp_path / "site.yaml", namespace="b")
    assert [document["metadata"]["namespace"] for document in elsewhere] == [
        "b",
        "b",
    ], "the dry run shows it"
    assert Kubectl().submit_job(elsewhere) == ("b", True)
    assert api.names("RayJob") == api.names("ConfigMap") == [elsewhere.job_name] * 2


def test_a_submission_that_was_killed_between_the_two_is_made_good(api, config):
    wanted = build_manifests(config, TEMPLATE)
    Kubectl().submit_job(wanted)
    (key,) = [key for key, found in api.objects.items() if found["kind"] == "ConfigMap"]
    del api.objects[key]
    assert Kubectl().submit_job(wanted) == ("vision", False)
    assert api.names("ConfigMap") == [wanted.job_name]


def test_a_config_of_a_job_that_was_deleted_is_replaced(api, config):
    """It is there until Kubernetes cleans up, and is not what the new pods should have."""
    wanted = build_manifests(config, TEMPLATE)
    Kubectl().submit_job(wanted)
    (key,) = [key for key, found in api.objects.items() if found["kind"] == "RayJob"]
    api.objects[key]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    with pytest.raises(
        UserError,
        match="is being deleted: submit again when it is gone, or with another --id",
    ):
        Kubectl().submit_job(wanted)
    del api.objects[key]
    for found in api.objects.values():
        found["metadata"]["ownerReferences"][0]["uid"] = "before"
        found["data"] = {}
    assert Kubectl().submit_job(wanted) == ("vision", True)
    (files,) = [found for found in api.objects.values() if found["kind"] == "ConfigMap"]
    assert files["metadata"]["ownerReferences"][0]["uid"] == f"uid-of-{wanted.job_name}"
    assert files["data"] == wanted.config_map["data"]


def test_a_run_whose_job_has_ended_gets_a_new_one(api, config):
    wanted = build_manifests(config, TEMPLATE)
    Kubectl().submit_job(wanted)
    for found in api.objects.values():
        found["status"] = {"jobDeploymentStatus": "Failed"}
    name = Kubectl().choose_job_name(wanted)
    assert name == f"{wanted.job_name}-2"
    assert Kubectl().submit_job(build_manifests(config, TEMPLATE, job_name=name)) == (
        "vision",
        True,
    )
    assert api.names("RayJob") == api.names("ConfigMap") == [wanted.job_name, name]


def test_a_field_that_the_cluster_does_not_know_is_a_sentence(api, config, tmp_path):
    (tmp_path / "site.yaml").write_text(
        TEMPLATE.read_text().replace("backoffLimit:", "backOffLimit:", 1)
    )
    with pytest.raises(
        UserError, match="kubectl failed: .*unknown field 'backOffLimit'"
    ):
        Kubectl().submit_job(build_manifests(config, tmp_path / "site.yaml"))
    assert api.objects == {}


def test_a_date_in_the_template_arrives_as_text(api, config, tmp_path):
    text = TEMPLATE.read_text().replace(
        "metadata:\n", "metadata:\n  annotations: {since: 2026-11-27}\n", 1
    )
    (tmp_path / "site.yaml").write_text(text)
    Kubectl().submit_job(build_manifests(config, tmp_path / "site.yaml"))
    (job,) = [found for found in api.objects.values() if found["kind"] == "RayJob"]
    assert job["metadata"]["annotations"]["since"].startswith("2026-11-27")


def test_a_plugin_that_asks_a_person_to_log_in_is_heard(api, config, tmp_path, capsys):
    version = "client.authentication.k8s.io/v1"
    credential = {
        "apiVersion": version,
        "kind": "ExecCredential",
        "status": {"token": "secret"},
    }
    plugin = tmp_path / "login"
    plugin.write_text(
        f"#!/bin/sh\necho open https://login and type ABC >&2\necho '{json.dumps(credential)}'\n"
    )
    plugin.chmod(0o755)
    kubeconfig = json.loads((tmp_path / "kubeconfig").read_text())
    exec_plugin = {
        "apiVersion": version,
        "command": str(plugin),
        "interactiveMode": "IfAvailable",
    }
    kubeconfig["users"] = [{"name": "there", "user": {"exec": exec_plugin}}]
    kubeconfig["clusters"][0]["cluster"]["server"] = api.url.replace(
        "http:", "https:"
    )  # without TLS it is not asked
    (tmp_path / "kubeconfig").write_text(json.dumps(kubeconfig))
    with pytest.raises(
        UserError, match="kubectl failed: Unable to connect to the server: tls:"
    ):
        Kubectl().choose_job_name(build_manifests(config, TEMPLATE))
    assert capsys.readouterr().err == "open https://login and type ABC\n"


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        (
            (403, "Forbidden", "you may not"),
            r"Error from server \(Forbidden\): .*you may not",
        ),
        ((401, "Unauthorized", "Unauthorized"), "You must be logged in to the server"),
        (
            (404, "NotFound", 'namespaces "x" not found'),
            r'Error from server \(NotFound\): .*namespaces "x" not found',
        ),
    ],
)
def test_what_the_cluster_refuses_is_a_sentence(api, config, refusal, sentence):
    api.refuse = refusal
    with pytest.raises(
        UserError,
        match=f"kubectl failed: .*{sentence}.*: check its context .kubectl config",
    ):
        Kubectl().submit_job(build_manifests(config, TEMPLATE))


def test_a_cluster_without_the_operator_is_a_sentence(serve, config):
    serve(operator=False)
    with pytest.raises(
        UserError,
        match="does not know RayJobs: install the KubeRay operator, 1.5.1 or newer",
    ):
        Kubectl().choose_job_name(build_manifests(config, TEMPLATE))


def test_a_cluster_that_does_not_answer_is_a_sentence(api, config):
    wanted = build_manifests(config, TEMPLATE)
    api.close()
    with pytest.raises(
        UserError,
        match="kubectl failed: The connection to the server 127.0.0.1:.* was refused",
    ):
        Kubectl().choose_job_name(wanted)


def run_as_operator(api: Api, name: str, log: str) -> None:
    """Add the Job and the Pod that the operator makes of a RayJob, with a log."""
    labels = {"job-name": name}
    about = {"name": name, "namespace": "vision", "labels": labels}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": about,
        "spec": {"selector": {"matchLabels": labels}},
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": about,
        "spec": {"containers": [{"name": "ray-job-submitter", "image": "distrain"}]},
        "status": {"phase": "Running"},
    }
    namespaces = "namespaces/vision"
    api.objects[f"/apis/batch/v1/{namespaces}/jobs/{name}"] = job
    api.objects[f"/api/v1/{namespaces}/pods/{name}"] = pod
    api.logs[f"/api/v1/{namespaces}/pods/{name}/log"] = log


@pytest.fixture
def run(api, plain_environment, tmp_path):
    """Run a command in a shell, with more words after it; return its output."""
    environment = {
        **plain_environment,
        "KUBECONFIG": str(tmp_path / "kubeconfig"),
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DISTRAIN_TEMPLATE": str(TEMPLATE),
    }

    def call(words: list[str], *more: str, folder: Path = tmp_path) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", " ".join([*words, *more])],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_what_runs_need_is_created_as_shown(api, run):
    run(
        shown(
            "kubectl create secret generic distrain-storage"
            " --from-literal=AWS_ACCESS_KEY_ID=... --from-literal=...",
            {"--from-literal=...": "--from-literal=AWS_SECRET_ACCESS_KEY=..."},
        )
    )
    for words in (
        shown("kubectl apply -f kuberay/networkpolicy.yaml"),
        shown("kubectl apply -f prometheus/podmonitor.yml"),
    ):
        assert "created" in run(words, folder=TEMPLATE.parents[1])
    assert api.names("Secret") == ["distrain-storage"]
    assert api.names("NetworkPolicy") == api.names("PodMonitor") == ["distrain"]


def test_a_run_is_submitted_followed_and_deleted_as_shown(api, run, tmp_path):
    write_recipe(tmp_path)

    # Submit it, and find it at work.
    paths = ("run=s3://bucket/runs/my", "data.train=s3://bucket/set", "data.val=null")
    for did in ("submitted", "is already queued or running"):
        words = shown("distrain submit my.yaml --to kuberay --workers 1-8")
        out = run(words, *paths, "--id=mine")
        assert out.splitlines()[0] == f"RayJob mine in vision {did}"
        assert "  kubectl -n vision logs -f job/mine | distrain logs -" in out
    assert api.names("RayJob") == ["mine"]

    # Follow it, and stop it.
    told = io.StringIO()
    JsonConsole(told).log("hello")
    run_as_operator(api, "mine", told.getvalue())
    job = {"NAME": "mine"}
    out = run(shown("kubectl logs -f job/NAME | distrain logs -", job))
    assert out == "hello\n"
    run(shown("kubectl delete rayjob NAME", job))
    assert api.names("RayJob") == []
