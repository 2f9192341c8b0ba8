"""Manifests for Kubernetes, checked strictly. Their way there is tried in tests/cluster/test_kubectl.py."""

from pathlib import Path

import kube
import pytest
import yaml

from distrain.config import parse_config_yaml
from distrain.distributed.config import Cluster
from distrain.errors import UserError
from distrain.launch.job_request import JOB_CONFIG_NAME, derive_job_id
from distrain.launch.kuberay import Kubectl, build_manifests

CLUSTER = Path(__file__).parents[2] / "cluster"
TEMPLATE = CLUSTER / "kuberay/rayjob.yaml"
FILES = [
    *sorted((CLUSTER / "kuberay").glob("*.yaml")),
    CLUSTER / "prometheus/podmonitor.yml",
]


def read(path):
    return list(yaml.safe_load_all(path.read_text()))


def pods(job_or_cluster):
    """Pod specs of a RayJob or RayCluster by group."""
    spec = job_or_cluster["spec"].get("rayClusterSpec", job_or_cluster["spec"])
    groups = {
        "head": spec["headGroupSpec"],
        **{group["groupName"]: group for group in spec["workerGroupSpecs"]},
    }
    return {name: group["template"]["spec"] for name, group in groups.items()}


@pytest.fixture
def config(narrow):
    found = narrow(run="s3://bucket/runs/My_Net")
    cluster = found.cluster.model_copy(
        update={"workers": (3, 20), "cpus_per_worker": 4, "gpus_per_worker": 1}
    )
    return found.model_copy(
        update={"cluster": cluster, "virtual_workers": 32, "device": "auto"}
    )


@pytest.fixture
def template(tmp_path):
    """The shipped one with other GPUs and cores in a pod, or with other words."""

    def make(old="", new="", gpus=4, cpus=16):
        text = TEMPLATE.read_text().replace(
            'nvidia.com/gpu: "1"', f'nvidia.com/gpu: "{gpus}"'
        )
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
    container = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"][
        "containers"
    ][0]
    container["resources"]["limits"]["memory"] = "8GB"
    container["image-pull-policy"] = "Always"
    container["ports"][0]["containerPort"] = "6379"
    del container["name"]
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 1
    found = "\n".join(kube.problems(job))
    for part in (
        "'8GB' is no quantity",
        "unknown field 'image-pull-policy'",
        "lacks name",
        "'6379' is no int",
    ):
        assert part in found
    assert "workerGroupSpecs[0]: unknown field 'minReplica'" in found


def test_the_manifest_shipped_has_all_that_a_run_is_filled_in_with(config):
    shipped, filled = (
        read(TEMPLATE)[0]["spec"],
        build_manifests(config, TEMPLATE).ray_job["spec"],
    )
    assert shipped.keys() == filled.keys()
    assert shipped["metadata"].keys() == filled["metadata"].keys(), (
        "a job is found by it"
    )
    variables = [
        yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"].keys()
        for spec in (shipped, filled)
    ]
    assert variables[0] == variables[1]


def test_the_config_shipped_is_one():
    _, files = read(TEMPLATE)
    parse_config_yaml(files["data"]["run.yaml"], "it")


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
        mounts = {
            mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]
        }
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert mounts.keys() == volumes.keys()
        assert mounts["shm"] == "/dev/shm"
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert mounts["tmp"] == "/tmp", (
            "Ray writes there, and the rest may not be written to"
        )
        assert container["lifecycle"]["preStop"]["exec"]["command"] == [
            "distrain",
            "drain",
        ]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["metrics"] == 8080
        assert group == "head" or ports["distrain"] == 9477
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert pod["terminationGracePeriodSeconds"] > 240, (
            "as long as `distrain drain` waits"
        )


def test_the_head_notices_lost_nodes_fast():
    from distrain.launch.ray_cluster import RAY_HEAD_ENV

    for name in ("rayjob.yaml", "raycluster.yaml"):
        env = pods(read(CLUSTER / "kuberay" / name)[0])["head"]["containers"][0]["env"]
        assert {
            item["name"]: item["value"] for item in env if item["name"] != "HOME"
        } == RAY_HEAD_ENV


def test_a_run_is_filled_in(config, template):
    found = build_manifests(config, template(), train_options=["--resume"])
    assert [problem for document in found for problem in kube.problems(document)] == []
    assert found.job_name.startswith("my-net-")
    spec = found.ray_job["spec"]
    assert spec["jobId"] == found.config_map["metadata"]["name"] == found.job_name
    assert (
        spec["entrypoint"]
        == "python -m distrain train /etc/distrain/run.yaml --address auto --resume"
    )
    assert spec["metadata"]["run"] == "s3://bucket/runs/My_Net"
    environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert environment["DISTRAIN_CONSOLE"] == "json"
    assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == "180"
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [
        1,
        1,
        5,
    ], "four GPUs a pod"
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    sent = parse_config_yaml(found.config_map["data"]["run.yaml"], "it")
    assert sent.metrics.address == "0.0.0.0", (
        "the loopback of a pod is a page for nobody"
    )
    assert sent == config.model_copy(update={"metrics": sent.metrics})
    volumes = [
        volume
        for pod in pods(found.ray_job).values()
        for volume in pod["volumes"]
        if volume["name"] == "run"
    ]
    assert [volume["configMap"]["name"] for volume in volumes] == [found.job_name] * 2
    assert found.ray_job["spec"]["rayClusterSpec"]["headGroupSpec"] != group
    again = yaml.safe_load_all(found.to_yaml())
    assert list(again) == [found.ray_job, found.config_map], (
        "the dry run shows what is sent"
    )


def test_a_fixed_number_of_workers_needs_no_autoscaler(config, template):
    cluster = config.cluster.model_copy(update={"workers": (4, 4)})
    found = build_manifests(
        config.model_copy(update={"cluster": cluster}), template(gpus=1)
    )
    spec = found.ray_job["spec"]["rayClusterSpec"]
    assert spec["enableInTreeAutoscaling"] is False
    assert (
        spec["workerGroupSpecs"][0]["minReplicas"]
        == spec["workerGroupSpecs"][0]["maxReplicas"]
        == 4
    )


@pytest.mark.parametrize(
    ("gpus", "virtual", "workers", "pods"),
    [(4, 32, [1, 32], 8), (4, 8, [1, 8], 2), (1, 32, [1, 8], 8), (0, 32, [1, 1], 1)],
)
def test_auto_is_a_rank_per_gpu_of_the_most_pods(
    config, template, gpus, virtual, workers, pods
):
    """The template has at most eight pods; without GPUs one rank trains."""
    auto = config.model_copy(update={"cluster": Cluster(), "virtual_workers": virtual})
    found = build_manifests(auto, template(gpus=gpus))
    (group,) = found.ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (
        1,
        1,
        pods,
    )
    assert found.ray_job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] == (
        workers != [1, 1]
    )
    assert (
        yaml.safe_load(found.config_map["data"][JOB_CONFIG_NAME])["cluster"]["workers"]
        == workers
    )


def test_python_files_go_along(config, template, tmp_path):
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets/deep.py").write_text("A = 1\n")
    found = build_manifests(config, template(), [tmp_path / "nets"])
    assert found.config_map["data"]["nets.deep.py"] == "A = 1\n"
    (source,) = [
        v["configMap"]
        for v in pods(found.ray_job)["head"]["volumes"]
        if v["name"] == "run"
    ]
    assert {item["key"]: item["path"] for item in source["items"]} == {
        "run.yaml": "run.yaml",
        "nets.deep.py": "nets/deep.py",
    }
    (tmp_path / "nets/deep.py").write_text("#" * (1 << 20))
    with pytest.raises(
        UserError,
        match="more than the 1,048,576 of a ConfigMap: put the Python files into",
    ):
        build_manifests(config, template(), [tmp_path / "nets"])


@pytest.mark.parametrize("job", ["Upper", "1st", "a_b", "a" * 48, "end-"])
def test_a_name_that_is_none_is_a_sentence(config, template, job):
    with pytest.raises(UserError, match="is not a valid RayJob name: use at most 47"):
        build_manifests(config, template(), job_name=job)


@pytest.mark.parametrize(
    "run",
    [
        "s3://b/1st",
        "s3://b/" + "1" * 80,
        "s3://b/" + "x" * 80,
        "s3://b/__",
        "s3://b/Ä",
    ],
)
def test_any_run_has_a_name(config, template, run):
    found = build_manifests(config.model_copy(update={"run": run}), template())
    assert kube.problems(found.ray_job) == []
    job_id = derive_job_id(config.model_copy(update={"run": run}))
    assert found.job_name.endswith(job_id[-8:]), "the hash is whole"
    assert (
        build_manifests(config, template(), job_name=found.job_name).job_name
        == found.job_name
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"old": "kind: RayJob", "new": "kind: RayService"},
            "must contain exactly one RayJob, not 0",
        ),
        ({"old": "- name: run\n", "new": "- name: other\n"}, "has no volume named run"),
        ({"old": "rayClusterSpec:", "new": "clusterSpec:"}, "lacks 'rayClusterSpec'"),
        ({"old": "apiVersion: ray", "new": "{: ray"}, "is not valid YAML"),
        ({"gpus": 0}, "a pod of gpu in .* has 16 CPUs and 0 GPUs"),
        ({"cpus": "0.5k"}, "cpu: 0.5k in .* is not a number of cores"),
        (
            {"cpus": "500m"},
            "a worker needs 4 CPUs and 1 GPU, but a pod of gpu in .* has 500m CPUs",
        ),
    ],
)
def test_a_template_that_is_none_is_a_sentence(config, template, change, sentence):
    with pytest.raises(UserError, match=sentence):
        build_manifests(config, template(**change))


def test_no_template_at_all(config, tmp_path):
    with pytest.raises(UserError, match="cannot read the template"):
        build_manifests(config, tmp_path / "none.yaml")


def test_without_kubectl_there_is_a_sentence(config, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError,
        match="kubectl is not in PATH: install it, or submit from a machine that has it",
    ):
        Kubectl().choose_job_name(build_manifests(config, TEMPLATE))
