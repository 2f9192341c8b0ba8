"""Runs on Kubernetes, as RayJobs of the KubeRay operator: a site's manifest with the run filled in, and its way there.

The manifest is the operator's, with image, secrets and kinds of nodes: cluster/kuberay/rayjob.yaml is one to start
from.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distrain.config import Config, to_yaml
from distrain.errors import UserError
from distrain.launch.allocation import (
    count_workers_per_node,
    describe_worker_request,
    resolve_gpus_per_worker,
)
from distrain.launch.job_request import (
    JOB_CONFIG_NAME,
    build_job_env,
    build_job_metadata,
    check_shared_paths,
    derive_job_id,
    read_user_files,
)

# Where the run's files are in its pods.
_POD_CONFIG_DIR = "/etc/distrain"
# Of a ConfigMap; a RayJob's name leaves room for what the operator puts behind it.
_MAX_CONFIG_MAP_BYTES, _MAX_NAME_LENGTH = 1 << 20, 47
_RAYJOB_RESOURCE = "rayjobs.ray.io"
_TERMINAL_STATUSES = ("Complete", "Failed", "ValidationFailed")
# What kubectl says of a kind that the cluster does not know, of get and of create.
_NO_OPERATOR_ERRORS = ("doesn't have a resource type", "no matches for kind")
# How kubectl says what went wrong, and what it logs for its authors before.
_ERROR_LINE_PATTERN = re.compile(r"error:|Error from|Unable to connect|The ")
_LOG_LINE_PATTERN = re.compile(r"[EWIF]\d{4} \d\d:")
_LOOPBACK_ADDRESSES = ("127.0.0.1", "::1", "localhost")


class JobManifests(NamedTuple):
    """What is applied for a run."""

    ray_job: dict[str, Any]
    """A RayJob."""
    config_map: dict[str, Any]
    """The ConfigMap with the config and Python files."""

    @property
    def job_name(self) -> str:
        """Of both."""
        return str(self.ray_job["metadata"]["name"])

    def to_yaml(self) -> str:
        """As YAML."""
        return "---\n".join(map(_dump_yaml, self))


def _dump_yaml(document: dict[str, Any]) -> str:
    return yaml.dump(document, Dumper=_ManifestDumper, sort_keys=False)


class _ManifestDumper(yaml.SafeDumper):
    """Texts of several lines as such, and nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_ManifestDumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def build_manifests(
    config: Config,
    template: Path,
    files: Sequence[Path] = (),
    *,
    job_name: str | None = None,
    namespace: str | None = None,
    must_resume: bool = False,
) -> JobManifests:
    """A site's manifest with a run filled in.

    Args:
        config: the run; its paths must mean the same in all pods.
        template: the site's file, with one RayJob.
        files: Python files, or folders of such, for a model, loss, optimizer or schedule of one's own.
        job: the RayJob's name; None: one that follows from the run.
        namespace: where it belongs; None: where the template says.
        must_resume: it is a mistake if there is no checkpoint.

    Raises:
        UserError: the template is none, a path is of this machine, a name is none of Kubernetes', or it is too much.
    """
    check_shared_paths(config)
    name = _validate_job_name(job_name or _to_kubernetes_name(derive_job_id(config)))
    if (
        config.metrics.address in _LOOPBACK_ADDRESSES
    ):  # in a pod, that is a page for nobody
        metrics = config.metrics.model_copy(update={"address": "0.0.0.0"})  # noqa: S104
        config = config.model_copy(update={"metrics": metrics})
    found, labels = _load_template(template)
    spec = found["spec"]
    found["metadata"]["name"] = spec["jobId"] = name
    if namespace is not None:
        found["metadata"]["namespace"] = namespace
    spec["entrypoint"] = (
        f"python -m distrain train {_POD_CONFIG_DIR}/{JOB_CONFIG_NAME} --address auto"
        + " --resume" * must_resume
    )
    environment = {**build_job_env(config), "PYTHONPATH": _POD_CONFIG_DIR}
    spec["runtimeEnvYAML"] = yaml.safe_dump({"env_vars": environment})
    spec["metadata"] = build_job_metadata(config)
    cluster = spec["rayClusterSpec"]
    config = _scale_worker_groups(cluster, config, template)
    sent = _read_config_map_files(config, files)
    # A key of a ConfigMap has no slash.
    keys = {path: path.replace("/", ".") for path in sent}
    items = [{"key": key, "path": path} for path, key in keys.items()]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        _mount_config_map(
            group["template"]["spec"], {"name": name, "items": items}, template
        )
    data = {keys[path]: text for path, text in sent.items()}
    about = {"name": name, "labels": labels} | (
        {"namespace": space} if (space := found["metadata"].get("namespace")) else {}
    )
    return JobManifests(
        found,
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": data},
    )


def _validate_job_name(name: str) -> str:
    """Return the name of a RayJob. Raises UserError if Kubernetes would refuse it."""
    if not re.fullmatch(
        rf"[a-z]([-a-z0-9]{{0,{_MAX_NAME_LENGTH - 2}}}[a-z0-9])?", name
    ):
        raise UserError(
            f"{name!r} is no name of a RayJob: at most {_MAX_NAME_LENGTH} small letters, digits and dashes, and a letter first"
        )
    return name


def _read_config_map_files(config: Config, files: Sequence[Path]) -> dict[str, str]:
    """Text by path of all that pods need. Raises UserError if it is more than a ConfigMap takes."""
    sent = {
        JOB_CONFIG_NAME: to_yaml(config),
        **{path: data.decode() for path, data in read_user_files(files).items()},
    }
    if (
        size := sum(len(text.encode()) for text in sent.values())
    ) > _MAX_CONFIG_MAP_BYTES:
        raise UserError(
            f"config and files are {size:,} bytes, more than the {_MAX_CONFIG_MAP_BYTES:,} of a ConfigMap: put them into the image"
        )
    return sent


def _scale_worker_groups(
    cluster: dict[str, Any], config: Config, template: Path
) -> Config:
    """Ask for as many pods as a run wants, where there is one kind of them; the config as it runs there."""
    groups = cluster["workerGroupSpecs"]
    if len(groups) == 1:
        each, gpus = _count_workers_per_pod(config, groups[0], template)
        least, most = _resolve_worker_range(
            config, each * int(groups[0].get("maxReplicas", 1)) if gpus else 0
        )
        few, many = -(-least // each), -(-most // each)
        groups[0].update(replicas=few, minReplicas=few, maxReplicas=many)
        cluster["enableInTreeAutoscaling"] = least < most
        # A cluster that has no GPU up yet must not look like one that has none.
        cluster_config = config.cluster.model_copy(
            update={"workers": (least, most), "gpus_per_worker": gpus}
        )
        return config.model_copy(update={"cluster": cluster_config})
    if (workers := config.cluster.workers) != "auto":
        cluster["enableInTreeAutoscaling"] = workers[0] < workers[1]
    return config


def _to_kubernetes_name(text: str) -> str:
    """A text as a name of Kubernetes', the end of it kept: that is what tells runs apart."""
    plain = re.sub(r"[^a-z0-9-]+", "-", text.lower())[-_MAX_NAME_LENGTH:].strip("-")
    return plain if plain[:1].isalpha() else f"run-{plain}"[:_MAX_NAME_LENGTH]


def _load_template(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The RayJob of a site's file, and its labels."""
    try:
        documents = [
            document
            for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
            if document
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the template {path}: {getattr(error, 'strerror', error)}"
        ) from None
    except yaml.YAMLError as error:
        raise UserError(
            f"the template {path} is no YAML: {' '.join(str(error).split())}"
        ) from None
    jobs = [d for d in documents if isinstance(d, dict) and d.get("kind") == "RayJob"]
    if len(jobs) != 1:
        raise UserError(
            f"the template {path} must hold one RayJob, not {len(jobs)}: see cluster/kuberay/rayjob.yaml"
        )
    # YAML's references make one object of several places, which then could not be filled in apart.
    found = yaml.safe_load(yaml.dump(jobs[0], Dumper=_ManifestDumper))
    try:
        cluster = found["spec"]["rayClusterSpec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            group["template"]["spec"]["containers"][0]["name"]
        return found, dict(found["metadata"].get("labels") or {})
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"the RayJob of {path} lacks {error}: see cluster/kuberay/rayjob.yaml"
        ) from None


def _resolve_worker_range(config: Config, num_gpus: int) -> tuple[int, int]:
    """Ranks at least and at most, where the pods have so many GPUs in all."""
    workers = config.cluster.workers
    return (
        (1, max(1, min(config.virtual_workers, num_gpus)))
        if workers == "auto"
        else workers
    )


def _count_workers_per_pod(
    config: Config, group: Mapping[str, Any], template: Path
) -> tuple[int, int]:
    """Return the number of ranks that fit into a pod of a group, and the GPUs of each rank."""
    resources = group["template"]["spec"]["containers"][0].get("resources") or {}
    has = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
    cpu = str(has.get("cpu", "0"))
    if not re.fullmatch(r"\d+(\.\d+)?|\d+m", cpu):
        raise UserError(
            f"cpu: {cpu} in {template} is no number of cores: write it like 16, 1.5 or 500m"
        )
    cores = float(cpu) if cpu[-1] != "m" else int(cpu[:-1]) / 1000
    gpus = int(has.get("nvidia.com/gpu", 0))
    room = count_workers_per_node(config, cores, gpus)
    if room < 1:
        raise UserError(
            f"a worker asks for {describe_worker_request(config, gpus)}, and a pod of {group.get('groupName')} in {template} has {cpu} "
            f"CPUs and {gpus} GPUs: lower cluster.cpus_per_worker, or give the pod more"
        )
    return room, resolve_gpus_per_worker(config, gpus)


def _mount_config_map(
    pod: dict[str, Any], config_map: dict[str, Any], template: Path
) -> None:
    """Let the volume named `run` of a pod be a ConfigMap."""
    for volume in pod.get("volumes") or []:
        if volume.get("name") == "run":
            volume["configMap"] = config_map
            return
    raise UserError(
        f"a pod in {template} has no volume named run, mounted at {_POD_CONFIG_DIR}: see cluster/kuberay/rayjob.yaml"
    )


class Kubectl:
    """A Kubernetes cluster with the KubeRay operator, by kubectl: it knows where the cluster is and who we are."""

    def choose_job_name(self, manifests: JobManifests) -> str:
        """The name of a run's RayJob: with a number behind it where one of that name has ended.

        Raises:
            UserError: the cluster cannot be reached, or refuses.
        """
        first = manifests.job_name
        jobs = self._run_kubectl(manifests, "get", _RAYJOB_RESOURCE)["items"]
        ended = {
            job["metadata"]["name"]
            for job in jobs
            if (job.get("status") or {}).get("jobDeploymentStatus")
            in _TERMINAL_STATUSES
        }
        names = (
            first,
            *(f"{first[: _MAX_NAME_LENGTH - 4]}-{number}" for number in range(2, 1000)),
        )
        return next(name for name in names if name not in ended)

    def submit_job(self, manifests: JobManifests) -> tuple[str, bool]:
        """Start a run, or find it if it is at work: its namespace, and whether it was started now.

        Raises:
            UserError: the cluster cannot be reached, or refuses.
        """
        try:
            there, started = (
                self._run_kubectl(manifests, "create", document=manifests.ray_job),
                True,
            )
        except FileExistsError:
            there, started = (
                self._run_kubectl(
                    manifests, "get", _RAYJOB_RESOURCE, manifests.job_name
                ),
                False,
            )
        about = there["metadata"]
        if about.get("deletionTimestamp"):
            raise UserError(
                f"RayJob {manifests.job_name} is being deleted: submit again when it is gone, or with another --id"
            )
        # Owned by the RayJob, the ConfigMap goes with it. Until it is there, pods wait for it.
        owner = {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "name": manifests.job_name,
            "uid": about["uid"],
        }
        files = {
            **manifests.config_map,
            "metadata": {
                **manifests.config_map["metadata"],
                "ownerReferences": [owner],
            },
        }
        try:
            self._run_kubectl(manifests, "create", document=files)
        except FileExistsError:  # ours, or one of a RayJob of that name that was deleted, which would go soon
            known = self._run_kubectl(
                manifests, "get", "configmaps", manifests.job_name
            )
            if owner["uid"] not in {
                ref["uid"] for ref in known["metadata"].get("ownerReferences") or ()
            }:
                self._run_kubectl(manifests, "replace", document=files)
        return str(about["namespace"]), started

    def _run_kubectl(
        self,
        manifests: JobManifests,
        *arguments: str,
        document: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Run kubectl where a run belongs; return what it says of the document, or of what the words name.

        Raises:
            FileExistsError: something of that name is there already.
            UserError: there is no kubectl here, or it failed.
        """
        if shutil.which("kubectl") is None:
            raise UserError(
                "there is no kubectl here: install it, or submit from where it is (--dry-run needs none)"
            )
        where = (
            [f"--namespace={space}"]
            if (space := manifests.ray_job["metadata"].get("namespace"))
            else []
        )
        command = [
            "kubectl",
            *arguments,
            *where,
            "--output=json",
            "--request-timeout=60s",
        ]
        with tempfile.TemporaryDirectory(prefix="distrain-") as folder:
            if document is not None:
                manifest = Path(folder) / "manifest.yaml"
                manifest.write_text(_dump_yaml(document))
                command.append(f"--filename={manifest}")
            code, output, why = _run_command(command, Path(folder) / "output.json")
        if not code:
            answer: dict[str, Any] = json.loads(output)
            return answer
        if "(AlreadyExists)" in why:
            raise FileExistsError(why)
        if any(sign in why for sign in _NO_OPERATOR_ERRORS):
            raise UserError(
                "the Kubernetes cluster knows no RayJobs: install the KubeRay operator, 1.5.1 or newer"
            )
        raise UserError(
            f"kubectl failed: {why[:500]}: check its context (kubectl config current-context) and your rights there"
        )


def _run_command(command: Sequence[str], output_path: Path) -> tuple[int, str, str]:
    """Run kubectl; return its exit code, what it printed into a file, and what it says went wrong.

    Other lines on its standard error are shown at once: a plugin of the kubeconfig's may ask a person to log in.
    """
    errors, others = list[str](), list[str]()
    with output_path.open("w") as file:
        process = subprocess.Popen(  # noqa: S603
            command, stdout=file, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                if _ERROR_LINE_PATTERN.match(line):
                    errors.append(line.strip())
                elif not _LOG_LINE_PATTERN.match(line):
                    others.append(line.strip())
                    sys.stderr.write(line)
        code = process.wait()
    return code, output_path.read_text(), " ".join(errors or others)
