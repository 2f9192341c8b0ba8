"""Runs on Kubernetes, as RayJobs of the KubeRay operator: fill in and submit one.

The manifest is the site's own, with its image, secrets and kinds of nodes;
cluster/kuberay/rayjob.yaml is one to start from.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distrain.config import Config, to_yaml
from distrain.errors import UserError
from distrain.launch.job_request import (
    JOB_CONFIG_NAME,
    build_job_env,
    build_job_metadata,
    check_shared_paths,
    derive_job_id,
    read_user_files,
)
from distrain.launch.rayjob_template import (
    POD_CONFIG_DIR,
    dump_yaml,
    load_template,
    mount_config_map,
    scale_worker_groups,
)

_MAX_CONFIG_MAP_BYTES = 1 << 20
# For a RayJob's name: leaves space for the suffixes that the operator appends.
_MAX_NAME_LENGTH = 47
_RAYJOB_RESOURCE = "rayjobs.ray.io"
_TERMINAL_STATUSES = ("Complete", "Failed", "ValidationFailed")
# Errors of `kubectl get` and `kubectl create` for a kind that the cluster lacks.
_NO_OPERATOR_ERRORS = ("doesn't have a resource type", "no matches for kind")
# Lines of kubectl's standard error: what went wrong, and its debug log before that.
_ERROR_LINE_PATTERN = re.compile(r"error:|Error from|Unable to connect|The ")
_LOG_LINE_PATTERN = re.compile(r"[EWIF]\d{4} \d\d:")
_LOOPBACK_ADDRESSES = ("127.0.0.1", "::1", "localhost")


class JobManifests(NamedTuple):
    """Kubernetes manifests of a run."""

    ray_job: dict[str, Any]
    """The RayJob."""
    config_map: dict[str, Any]
    """The ConfigMap with the config and the user's Python files."""

    @property
    def job_name(self) -> str:
        """Name of the RayJob and of the ConfigMap."""
        return str(self.ray_job["metadata"]["name"])

    def to_yaml(self) -> str:
        """Return both manifests as one YAML stream."""
        return "---\n".join(map(dump_yaml, self))


def build_manifests(
    config: Config,
    template: Path,
    files: Sequence[Path] = (),
    *,
    job_name: str | None = None,
    namespace: str | None = None,
    train_options: Sequence[str] = (),
) -> JobManifests:
    """Fill a run into a site's manifest.

    Args:
        config: the run; its paths must mean the same in all pods.
        template: the site's file, with one RayJob.
        files: Python files, or folders of them, for the user's own model, loss,
            optimizer or schedule.
        job_name: the RayJob's name; None: derive it from the run.
        namespace: Kubernetes namespace; None: the template's.
        train_options: options of `distrain train`, e.g. --resume.

    Raises:
        UserError: the template is invalid, a path is local to this machine, the name is
            not a valid RayJob name, or the files exceed the limit of a ConfigMap.
    """
    check_shared_paths(config)
    name = _validate_job_name(job_name or _to_kubernetes_name(derive_job_id(config)))
    # Serve metrics on all interfaces: loopback is unreachable from outside the pod.
    if config.metrics.address in _LOOPBACK_ADDRESSES:
        metrics = config.metrics.model_copy(update={"address": "0.0.0.0"})  # noqa: S104
        config = config.model_copy(update={"metrics": metrics})

    # Fill the run into the RayJob.
    ray_job, labels = load_template(template)
    _fill_in_job(ray_job, config, name, namespace, train_options)
    cluster = ray_job["spec"]["rayClusterSpec"]
    config = scale_worker_groups(cluster, config, template)

    # Mount its files into every pod. A key of a ConfigMap must not have a slash.
    texts = _read_config_map_files(config, files)
    keys = {path: path.replace("/", ".") for path in texts}
    items = [{"key": key, "path": path} for path, key in keys.items()]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mount_config_map(pod, {"name": name, "items": items}, template)
    data = {keys[path]: text for path, text in texts.items()}
    return JobManifests(ray_job, _build_config_map(ray_job, labels, data))


def _validate_job_name(name: str) -> str:
    """Return a RayJob's name. Raises UserError if Kubernetes would refuse it."""
    if not re.fullmatch(
        rf"[a-z]([-a-z0-9]{{0,{_MAX_NAME_LENGTH - 2}}}[a-z0-9])?", name
    ):
        raise UserError(
            f"{name!r} is not a valid RayJob name: use at most {_MAX_NAME_LENGTH} "
            "lowercase letters, digits and dashes, starting with a letter and not "
            "ending with a dash"
        )
    return name


def _to_kubernetes_name(text: str) -> str:
    """Turn a job id into a valid name. The hash at its end, which is unique, stays."""
    name = re.sub(r"[^a-z0-9-]+", "-", text.lower())[-_MAX_NAME_LENGTH:].strip("-")
    if name[:1].isalpha():
        return name
    prefix = "run-"
    return prefix + name[len(prefix) - _MAX_NAME_LENGTH :]


def _fill_in_job(
    ray_job: dict[str, Any],
    config: Config,
    name: str,
    namespace: str | None,
    train_options: Sequence[str],
) -> None:
    """Set name, command, environment and metadata of a RayJob in place."""
    spec = ray_job["spec"]
    ray_job["metadata"]["name"] = name
    spec["jobId"] = name
    if namespace is not None:
        ray_job["metadata"]["namespace"] = namespace
    config_path = f"{POD_CONFIG_DIR}/{JOB_CONFIG_NAME}"
    command = f"python -m distrain train {config_path} --address auto"
    spec["entrypoint"] = " ".join([command, *train_options])
    environment = {**build_job_env(config), "PYTHONPATH": POD_CONFIG_DIR}
    spec["runtimeEnvYAML"] = yaml.safe_dump({"env_vars": environment})
    spec["metadata"] = build_job_metadata(config)


def _build_config_map(
    ray_job: dict[str, Any], labels: dict[str, str], data: dict[str, str]
) -> dict[str, Any]:
    """Build a ConfigMap with the name and namespace of a RayJob."""
    metadata: dict[str, Any] = {"name": ray_job["metadata"]["name"], "labels": labels}
    if namespace := ray_job["metadata"].get("namespace"):
        metadata["namespace"] = namespace
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "data": data,
    }


def _read_config_map_files(config: Config, files: Sequence[Path]) -> dict[str, str]:
    """Return the text of all files that the pods need, by path.

    Raises:
        UserError: they are larger than a ConfigMap may be.
    """
    texts = {JOB_CONFIG_NAME: to_yaml(config)}
    for path, data in read_user_files(files).items():
        texts[path] = data.decode()
    num_bytes = sum(len(text.encode()) for text in texts.values())
    if num_bytes > _MAX_CONFIG_MAP_BYTES:
        raise UserError(
            f"the config and the Python files are {num_bytes:,} bytes, more than the "
            f"{_MAX_CONFIG_MAP_BYTES:,} of a ConfigMap: put the Python files into the "
            "image"
        )
    return texts


class Kubectl:
    """A Kubernetes cluster with the KubeRay operator, reached through kubectl.

    Address, credentials and default namespace are those of kubectl's kubeconfig.
    """

    def choose_job_name(self, manifests: JobManifests) -> str:
        """Return the run's RayJob name, numbered if a RayJob of that name has ended.

        The number is the lowest, from 2, with which no RayJob has ended.

        Raises:
            UserError: the cluster cannot be reached, or refuses.
        """
        jobs = self._run_kubectl(manifests, "get", _RAYJOB_RESOURCE)["items"]
        ended_names = set()
        for job in jobs:
            status = (job.get("status") or {}).get("jobDeploymentStatus")
            if status in _TERMINAL_STATUSES:
                ended_names.add(job["metadata"]["name"])
        # Four characters are left for the dash and the number: a name near the limit
        # loses up to four characters of its hash.
        stem = manifests.job_name[: _MAX_NAME_LENGTH - 4]
        numbered_names = (f"{stem}-{number}" for number in range(2, 1000))
        candidates = (manifests.job_name, *numbered_names)
        return next(name for name in candidates if name not in ended_names)

    def submit_job(self, manifests: JobManifests) -> tuple[str, bool]:
        """Start a run's RayJob, unless one of its name exists.

        Returns:
            Its namespace, and True if it was started now.

        Raises:
            UserError: the cluster cannot be reached, or refuses; or the existing RayJob
                is being deleted.
        """
        try:
            ray_job = self._run_kubectl(manifests, "create", document=manifests.ray_job)
            is_new = True
        except FileExistsError:
            ray_job = self._run_kubectl(
                manifests, "get", _RAYJOB_RESOURCE, manifests.job_name
            )
            is_new = False
        metadata = ray_job["metadata"]
        if metadata.get("deletionTimestamp"):
            raise UserError(
                f"RayJob {manifests.job_name} is being deleted: submit again when it "
                "is gone, or with another --id"
            )
        # Second, since it needs the RayJob's uid. Pods wait until the ConfigMap exists.
        self._create_config_map(manifests, owner_uid=metadata["uid"])
        return str(metadata["namespace"]), is_new

    def _create_config_map(self, manifests: JobManifests, owner_uid: str) -> None:
        """Create the ConfigMap, owned by the RayJob: it is deleted together with it."""
        owner = {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "name": manifests.job_name,
            "uid": owner_uid,
        }
        metadata = {**manifests.config_map["metadata"], "ownerReferences": [owner]}
        config_map = {**manifests.config_map, "metadata": metadata}
        try:
            self._run_kubectl(manifests, "create", document=config_map)
        except FileExistsError:
            # It is this RayJob's, or that of a deleted RayJob of the same name, which
            # Kubernetes has not removed yet.
            existing = self._run_kubectl(
                manifests, "get", "configmaps", manifests.job_name
            )
            references = existing["metadata"].get("ownerReferences") or ()
            if owner_uid not in {reference["uid"] for reference in references}:
                self._run_kubectl(manifests, "replace", document=config_map)

    def _run_kubectl(
        self,
        manifests: JobManifests,
        *arguments: str,
        document: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Run kubectl in the run's namespace; return the object that it prints.

        Args:
            manifests: of the run.
            arguments: a verb, and the objects if no document names them.
            document: the manifest to create or replace.

        Raises:
            FileExistsError: an object of that name exists.
            UserError: kubectl is missing, or it failed.
        """
        if shutil.which("kubectl") is None:
            raise UserError(
                "kubectl is not in PATH: install it, or submit from a machine that has "
                "it (--dry-run does not need it)"
            )
        command = ["kubectl", *arguments]
        if namespace := manifests.ray_job["metadata"].get("namespace"):
            command.append(f"--namespace={namespace}")
        command += ["--output=json", "--request-timeout=60s"]
        with tempfile.TemporaryDirectory(prefix="distrain-") as folder:
            if document is not None:
                manifest = Path(folder) / "manifest.yaml"
                manifest.write_text(dump_yaml(document))
                command.append(f"--filename={manifest}")
            exit_code, output, error = _run_command(
                command, Path(folder) / "output.json"
            )
        if exit_code == 0:
            answer: dict[str, Any] = json.loads(output)
            return answer

        # kubectl has one exit code for all failures: its message tells them apart.
        if "(AlreadyExists)" in error:
            raise FileExistsError(error)
        if any(text in error for text in _NO_OPERATOR_ERRORS):
            raise UserError(
                "the Kubernetes cluster does not know RayJobs: install the KubeRay "
                "operator, 1.5.1 or newer"
            )
        raise UserError(
            f"kubectl failed: {error[:500]}: check its context (kubectl config "
            "current-context) and your permissions there"
        )


def _run_command(command: Sequence[str], output_path: Path) -> tuple[int, str, str]:
    """Run kubectl; return its exit code, its output, and its error message.

    Other lines on its standard error are shown at once: a plugin of the kubeconfig may
    ask the user to log in.
    """
    error_lines = []
    other_lines = []
    # Standard output goes to a file: read from a second pipe, it could fill up while
    # this process waits for the first.
    with output_path.open("w") as file:
        process = subprocess.Popen(  # noqa: S603
            command, stdout=file, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                if _ERROR_LINE_PATTERN.match(line):
                    error_lines.append(line.strip())
                elif not _LOG_LINE_PATTERN.match(line):
                    other_lines.append(line.strip())
                    sys.stderr.write(line)
        exit_code = process.wait()
    return exit_code, output_path.read_text(), " ".join(error_lines or other_lines)
