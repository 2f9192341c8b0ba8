"""Manifests for Kubernetes, checked strictly, and their way through the API's own client."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import kube
import pytest
import yaml

from distrain.config import parse_yaml
from distrain.distributed.config import Cluster
from distrain.errors import UserError
from distrain.launch.kuberay import Kubernetes, manifests
from distrain.launch.package import CONFIG

CLUSTER = Path(__file__).parents[2] / "cluster"
TEMPLATE = CLUSTER / "kuberay/rayjob.yaml"
FILES = [*sorted((CLUSTER / "kuberay").glob("*.yaml")), CLUSTER / "prometheus/podmonitor.yml"]


def read(path):
    return list(yaml.safe_load_all(path.read_text()))


def pods(job_or_cluster):
    """Pod specs of a RayJob or RayCluster by group."""
    spec = job_or_cluster["spec"].get("rayClusterSpec", job_or_cluster["spec"])
    groups = {"head": spec["headGroupSpec"], **{group["groupName"]: group for group in spec["workerGroupSpecs"]}}
    return {name: group["template"]["spec"] for name, group in groups.items()}


@pytest.fixture
def config(narrow):
    found = narrow(run="s3://bucket/runs/My_Net")
    cluster = found.cluster.model_copy(update={"workers": (3, 20), "cpus_per_worker": 4, "gpus_per_worker": 1})
    return found.model_copy(update={"cluster": cluster, "virtual_workers": 32, "device": "auto"})


@pytest.fixture
def template(tmp_path):
    """The shipped one with other GPUs and cores in a pod, or with other words."""

    def make(old="", new="", gpus=4, cpus=16):
        text = TEMPLATE.read_text().replace('nvidia.com/gpu: "1"', f'nvidia.com/gpu: "{gpus}"')
        text = text.replace('cpu: "16"', f'cpu: "{cpus}"')
        assert old in text
        path = tmp_path / "site.yaml"
        path.write_text(text.replace(old, new))
        return path

    return make


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_shipped_is_what_the_api_takes(path):
    for document in read(path):
        assert kube.problems(document) == []


def test_the_check_finds_what_is_wrong():
    job, _ = read(TEMPLATE)
    container = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    container["resources"]["limits"]["memory"] = "8GB"
    container["image-pull-policy"] = "Always"
    container["ports"][0]["containerPort"] = "6379"
    del container["name"]
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 1
    found = "\n".join(kube.problems(job))
    for part in ("'8GB' is no quantity", "unknown field 'image-pull-policy'", "lacks name", "'6379' is no int"):
        assert part in found
    assert "workerGroupSpecs[0]: unknown field 'minReplica'" in found


def test_the_manifest_shipped_has_all_that_a_run_is_filled_in_with(config):
    shipped, filled = read(TEMPLATE)[0]["spec"], manifests(config, TEMPLATE).job["spec"]
    assert shipped.keys() == filled.keys()
    assert shipped["metadata"].keys() == filled["metadata"].keys(), "a job is found by it"
    variables = [yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"].keys() for spec in (shipped, filled)]
    assert variables[0] == variables[1]


def test_the_config_shipped_is_one():
    _, files = read(TEMPLATE)
    parse_yaml(files["data"]["run.yaml"], "it")


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycluster.yaml"])
def test_pods_are_not_root_have_shared_memory_and_are_drained(name):
    document = read(CLUSTER / "kuberay" / name)[0]
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["autoscalerOptions"]["securityContext"]["readOnlyRootFilesystem"]
    for group, pod in pods(document).items():
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert mounts.keys() == volumes.keys()
        assert mounts["shm"] == "/dev/shm"
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert mounts["tmp"] == "/tmp", "Ray writes there, and the rest may not be written to"
        assert container["lifecycle"]["preStop"]["exec"]["command"] == ["distrain", "drain"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["metrics"] == 8080
        assert group == "head" or ports["distrain"] == 9477
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert pod["terminationGracePeriodSeconds"] > 240, "as long as `distrain drain` waits"


def test_the_head_notices_lost_nodes_fast():
    from distrain.launch.ray_cluster import HEAD_SETTINGS

    for name in ("rayjob.yaml", "raycluster.yaml"):
        env = pods(read(CLUSTER / "kuberay" / name)[0])["head"]["containers"][0]["env"]
        assert {item["name"]: item["value"] for item in env if item["name"] != "HOME"} == HEAD_SETTINGS


def test_a_run_is_filled_in(config, template):
    found = manifests(config, template(), must_resume=True)
    assert [problem for document in found for problem in kube.problems(document)] == []
    assert found.name.startswith("my-net-")
    spec = found.job["spec"]
    assert spec["jobId"] == found.files["metadata"]["name"] == found.name
    assert spec["entrypoint"] == "python -m distrain train /etc/distrain/run.yaml --address auto --resume"
    assert spec["metadata"]["run"] == "s3://bucket/runs/My_Net"
    environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert environment["DISTRAIN_CONSOLE"] == "json"
    assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == "180"
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [1, 1, 5], "four GPUs a pod"
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    sent = parse_yaml(found.files["data"]["run.yaml"], "it")
    assert sent.metrics.address == "0.0.0.0", "the loopback of a pod is a page for nobody"
    assert sent == config.model_copy(update={"metrics": sent.metrics})
    volumes = [volume for pod in pods(found.job).values() for volume in pod["volumes"] if volume["name"] == "run"]
    assert [volume["configMap"]["name"] for volume in volumes] == [found.name] * 2
    assert found.job["spec"]["rayClusterSpec"]["headGroupSpec"] != group
    again = yaml.safe_load_all(found.text())
    assert list(again) == [found.job, found.files], "the dry run shows what is sent"


def test_a_fixed_number_of_workers_needs_no_autoscaler(config, template):
    cluster = config.cluster.model_copy(update={"workers": (4, 4)})
    found = manifests(config.model_copy(update={"cluster": cluster}), template(gpus=1))
    spec = found.job["spec"]["rayClusterSpec"]
    assert spec["enableInTreeAutoscaling"] is False
    assert spec["workerGroupSpecs"][0]["minReplicas"] == spec["workerGroupSpecs"][0]["maxReplicas"] == 4


@pytest.mark.parametrize(
    ("gpus", "virtual", "workers", "pods"),
    [(4, 32, [1, 32], 8), (4, 8, [1, 8], 2), (1, 32, [1, 8], 8), (0, 32, [1, 1], 1)],
)
def test_auto_is_a_rank_per_gpu_of_the_most_pods(config, template, gpus, virtual, workers, pods):
    """The template has at most eight pods; without GPUs one rank trains."""
    auto = config.model_copy(update={"cluster": Cluster(), "virtual_workers": virtual})
    found = manifests(auto, template(gpus=gpus))
    (group,) = found.job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, pods)
    assert found.job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] == (workers != [1, 1])
    assert yaml.safe_load(found.files["data"][CONFIG])["cluster"]["workers"] == workers


def test_python_files_go_along(config, template, tmp_path):
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets/deep.py").write_text("A = 1\n")
    found = manifests(config, template(), [tmp_path / "nets"])
    assert found.files["data"]["nets.deep.py"] == "A = 1\n"
    (source,) = [v["configMap"] for v in pods(found.job)["head"]["volumes"] if v["name"] == "run"]
    assert {item["key"]: item["path"] for item in source["items"]} == {
        "run.yaml": "run.yaml",
        "nets.deep.py": "nets/deep.py",
    }
    (tmp_path / "nets/deep.py").write_text("#" * (1 << 20))
    with pytest.raises(UserError, match="more than the 1,048,576 of a ConfigMap: put them into the image"):
        manifests(config, template(), [tmp_path / "nets"])


@pytest.mark.parametrize("job", ["Upper", "1st", "a_b", "a" * 48, "end-"])
def test_a_name_that_is_none_is_a_sentence(config, template, job):
    with pytest.raises(UserError, match="is no name of a RayJob: at most 47"):
        manifests(config, template(), job=job)


@pytest.mark.parametrize("run", ["s3://b/1st", "s3://b/" + "x" * 80, "s3://b/__", "s3://b/Ä"])
def test_any_run_has_a_name(config, template, run):
    found = manifests(config.model_copy(update={"run": run}), template())
    assert kube.problems(found.job) == []
    assert manifests(config, template(), job=found.name).name == found.name


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"old": "kind: RayJob", "new": "kind: RayService"}, "must hold one RayJob, not 0"),
        ({"old": "- name: run\n", "new": "- name: other\n"}, "has no volume named run"),
        ({"old": "rayClusterSpec:", "new": "clusterSpec:"}, "lacks 'rayClusterSpec'"),
        ({"old": "apiVersion: ray", "new": "{: ray"}, "is no YAML"),
        ({"gpus": 0}, "a pod of gpu in .* has 16 CPUs and 0 GPUs"),
        ({"cpus": "0.5k"}, "cpu: 0.5k in .* is no number of cores"),
        ({"cpus": "500m"}, "a worker asks for 4 CPUs and 1 GPU, and a pod of gpu in .* has 500m CPUs"),
    ],
)
def test_a_template_that_is_none_is_a_sentence(config, template, change, sentence):
    with pytest.raises(UserError, match=sentence):
        manifests(config, template(**change))


def test_no_template_at_all(config, tmp_path):
    with pytest.raises(UserError, match="cannot read the template"):
        manifests(config, tmp_path / "none.yaml")


class Api:
    """A server that plays what Kubernetes' API does with these two kinds. It takes only what is strictly right."""

    def __init__(self) -> None:
        self.objects: dict[str, dict] = {}
        self.refuse: tuple[int, str] | None = None
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                listed = [o for key, o in api.objects.items() if key.startswith(self._path + "/")]
                self._answer(200, api.objects.get(self._path, {"items": listed}))

            def do_PUT(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self._path in api.objects
                api.objects[self._path] = body
                self._answer(200, body)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                key = f"{self._path}/{body['metadata']['name']}"
                if problems := kube.problems(body):
                    self._answer(422, {"message": "; ".join(problems)})
                elif key in api.objects:
                    self._answer(409, {"message": "already exists"})
                else:
                    body["metadata"]["uid"] = f"uid-of-{body['metadata']['name']}"
                    api.objects[key] = body
                    self._answer(201, body)

            @property
            def _path(self) -> str:
                return self.path.partition("?")[0]

            def _answer(self, status: int, body: dict) -> None:
                if api.refuse is not None:
                    status, body = api.refuse[0], {"message": api.refuse[1]}
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def names(self, kind: str) -> list[str]:
        return [key.rpartition("/")[2] for key, found in self.objects.items() if found["kind"] == kind]


@pytest.fixture
def api(tmp_path, monkeypatch) -> Iterator[Api]:
    server = Api()
    there = {"name": "there"}
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{**there, "cluster": {"server": server.url}}],
        "users": [{**there, "user": {}}],
        "contexts": [{**there, "context": {"cluster": "there", "user": "there", "namespace": "vision"}}],
        "current-context": "there",
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    yield server
    server.server.shutdown()
    server.server.server_close()
    server.thread.join()


def test_the_client_applies_it_once(api, config, template):
    wanted = manifests(config, template())
    assert Kubernetes().submit(wanted) == ("vision", True)
    job, files = api.objects.values()
    assert job["spec"] == wanted.job["spec"]
    assert files["metadata"]["ownerReferences"][0] == {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "name": wanted.name,
        "uid": job["metadata"]["uid"],
    }
    assert Kubernetes().name_for(wanted) == wanted.name
    assert Kubernetes().submit(wanted) == ("vision", False), "at work already"
    assert len(api.objects) == 2
    elsewhere = manifests(
        config, template("metadata:\n  name: alexnet #", "metadata:\n  namespace: a\n  name: alexnet #")
    )
    assert Kubernetes().submit(elsewhere) == ("a", True)
    elsewhere = manifests(
        config, template("metadata:\n  name: alexnet #", "metadata:\n  namespace: a\n  name: alexnet #"), namespace="b"
    )
    assert [document["metadata"]["namespace"] for document in elsewhere] == ["b", "b"], "the dry run shows it"
    assert Kubernetes().submit(elsewhere) == ("b", True)


def test_a_client_that_died_between_the_two_is_made_good(api, config, template):
    wanted = manifests(config, template())
    Kubernetes().submit(wanted)
    (key,) = [key for key, found in api.objects.items() if found["kind"] == "ConfigMap"]
    del api.objects[key]
    assert Kubernetes().submit(wanted) == ("vision", False)
    assert api.names("ConfigMap") == [wanted.name]


def test_a_config_of_a_job_that_was_deleted_is_replaced(api, config, template):
    """It is there until Kubernetes cleans up, and is not what the new pods should have."""
    wanted = manifests(config, template())
    Kubernetes().submit(wanted)
    (key,) = [key for key, found in api.objects.items() if found["kind"] == "RayJob"]
    api.objects[key]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    with pytest.raises(UserError, match="is being deleted: submit again when it is gone, or with another --id"):
        Kubernetes().submit(wanted)
    del api.objects[key]
    for found in api.objects.values():
        found["metadata"]["ownerReferences"][0]["uid"] = "before"
        found["data"] = {}
    assert Kubernetes().submit(wanted) == ("vision", True)
    (files,) = [found for found in api.objects.values() if found["kind"] == "ConfigMap"]
    assert files["metadata"]["ownerReferences"][0]["uid"] == f"uid-of-{wanted.name}"
    assert files["data"] == wanted.files["data"]


def test_a_run_whose_job_has_ended_gets_a_new_one(api, config, template):
    wanted = manifests(config, template())
    Kubernetes().submit(wanted)
    for found in api.objects.values():
        found["status"] = {"jobDeploymentStatus": "Failed"}
    name = Kubernetes().name_for(wanted)
    assert name == f"{wanted.name}-2"
    assert Kubernetes().submit(manifests(config, template(), job=name)) == ("vision", True)
    assert api.names("RayJob") == api.names("ConfigMap") == [wanted.name, name]


@pytest.mark.parametrize(
    ("status", "message", "sentence"),
    [
        (404, "page not found", "knows no RayJobs: install the KubeRay operator, 1.5.1 or newer"),
        (404, 'namespaces "x" not found', 'refused: namespaces "x" not found'),
        (403, "you may not", "does not let you: you may not"),
        (401, "Unauthorized", "does not let you: Unauthorized"),
        (422, "spec.jobId: too odd", "refused: spec.jobId: too odd"),
    ],
)
def test_what_the_cluster_refuses_is_a_sentence(api, config, template, status, message, sentence):
    api.refuse = (status, message)
    with pytest.raises(UserError, match=sentence):
        Kubernetes().submit(manifests(config, template()))


def test_no_cluster_is_a_sentence(api, config, template, monkeypatch, tmp_path):
    cluster = Kubernetes()
    api.server.shutdown()
    api.server.server_close()
    with pytest.raises(UserError, match=r"no Kubernetes answers at http://127.0.0.1:\d+ \(NewConnectionError\)"):
        cluster.submit(manifests(config, template()))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no Kubernetes cluster is configured here: set KUBECONFIG"):
        Kubernetes()
