"""A site's RayJob manifest: read and check it, size its worker groups, mount files."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from distrain.config import Config
from distrain.errors import UserError
from distrain.launch.allocation import (
    count_workers_per_node,
    describe_worker_request,
    resolve_gpus_per_worker,
)

POD_CONFIG_DIR = "/etc/distrain"
"""Folder in the pods of a run that holds its config and Python files."""


class _ManifestDumper(yaml.SafeDumper):
    """Writes multi-line strings as blocks, and no YAML references."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_ManifestDumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def dump_yaml(document: dict[str, Any]) -> str:
    """Write a manifest as YAML, its keys in their order."""
    return yaml.dump(document, Dumper=_ManifestDumper, sort_keys=False)


def load_template(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the RayJob of a site's file; return it and its labels.

    Raises:
        UserError: the file cannot be read, or does not contain exactly one RayJob with
            all parts that a run is filled into.
    """
    # Find the one RayJob; the file may hold other documents too.
    try:
        text = path.read_text(encoding="utf-8")
        documents = [document for document in yaml.safe_load_all(text) if document]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", error)
        raise UserError(f"cannot read the template {path}: {reason}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the template {path} is not valid YAML, correct it: {reason}"
        ) from None
    ray_jobs = [
        document
        for document in documents
        if isinstance(document, dict) and document.get("kind") == "RayJob"
    ]
    if len(ray_jobs) != 1:
        raise UserError(
            f"the template {path} must contain exactly one RayJob, not "
            f"{len(ray_jobs)}: see cluster/kuberay/rayjob.yaml"
        )

    # Write and read it once: a YAML reference makes one Python object of several parts,
    # which could not be filled in separately.
    ray_job = yaml.safe_load(yaml.dump(ray_jobs[0], Dumper=_ManifestDumper))

    # Access all that is filled in later, so that what is missing is reported here.
    try:
        cluster = ray_job["spec"]["rayClusterSpec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            group["template"]["spec"]["containers"][0]["name"]
        return ray_job, dict(ray_job["metadata"].get("labels") or {})
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"the RayJob in {path} lacks {error}: see cluster/kuberay/rayjob.yaml"
        ) from None


def scale_worker_groups(
    cluster: dict[str, Any], config: Config, template: Path
) -> Config:
    """Set the number of pods of a RayCluster to what the run asks for.

    Args:
        cluster: the RayCluster's spec; changed in place. Its replicas are set only if
            it has a single worker group: with several, the site's own numbers stay.
        config: the run.
        template: the site's file, for messages.

    Returns:
        The config as the run uses it there: with a single group its `auto` workers and
        GPUs are resolved.

    Raises:
        UserError: a pod is too small for a worker.
    """
    groups = cluster["workerGroupSpecs"]
    if len(groups) != 1:
        if config.cluster.workers != "auto":
            min_workers, max_workers = config.cluster.workers
            cluster["enableInTreeAutoscaling"] = min_workers < max_workers
        return config

    (group,) = groups
    workers_per_pod, gpus_per_worker = _count_workers_per_pod(config, group, template)
    # auto: as many ranks as the largest number of pods has GPUs.
    max_gpus = 0
    if gpus_per_worker:
        max_gpus = workers_per_pod * int(group.get("maxReplicas", 1))
    min_workers, max_workers = _resolve_worker_range(config, max_gpus)

    # Pods, rounded up; the autoscaler works between the two numbers.
    min_pods = -(-min_workers // workers_per_pod)
    max_pods = -(-max_workers // workers_per_pod)
    group.update(replicas=min_pods, minReplicas=min_pods, maxReplicas=max_pods)
    cluster["enableInTreeAutoscaling"] = min_workers < max_workers

    # Resolved here, not in the pods: a cluster whose GPU nodes are not up yet would
    # look there like a cluster without GPUs.
    cluster_config = config.cluster.model_copy(
        update={
            "workers": (min_workers, max_workers),
            "gpus_per_worker": gpus_per_worker,
        }
    )
    return config.model_copy(update={"cluster": cluster_config})


def _resolve_worker_range(config: Config, num_gpus: int) -> tuple[int, int]:
    """Return the least and the most ranks, for pods with `num_gpus` GPUs in all."""
    if config.cluster.workers != "auto":
        return config.cluster.workers
    return 1, max(1, min(config.virtual_workers, num_gpus))


def _count_workers_per_pod(
    config: Config, group: Mapping[str, Any], template: Path
) -> tuple[int, int]:
    """Return the number of ranks that fit into a pod of a group, and GPUs per rank.

    Raises:
        UserError: the pod's cores cannot be read, or it is too small for a rank.
    """
    # A limit counts before a request: it is what the pod can really use.
    resources = group["template"]["spec"]["containers"][0].get("resources") or {}
    quantities = {
        **(resources.get("requests") or {}),
        **(resources.get("limits") or {}),
    }

    # Kubernetes writes cores as 16, 1.5, or in thousandths as 500m.
    cpu = str(quantities.get("cpu", "0"))
    if not re.fullmatch(r"\d+(\.\d+)?|\d+m", cpu):
        raise UserError(
            f"cpu: {cpu} in {template} is not a number of cores: write it like 16, 1.5 "
            "or 500m"
        )
    num_cpus = int(cpu[:-1]) / 1000 if cpu.endswith("m") else float(cpu)
    num_gpus = int(quantities.get("nvidia.com/gpu", 0))

    num_workers = count_workers_per_node(config, num_cpus, num_gpus)
    if num_workers < 1:
        raise UserError(
            f"a worker needs {describe_worker_request(config, num_gpus)}, but a pod of "
            f"{group.get('groupName')} in {template} has {cpu} CPUs and {num_gpus} "
            "GPUs: lower cluster.cpus_per_worker, or give the pod more"
        )
    return num_workers, resolve_gpus_per_worker(config, num_gpus)


def mount_config_map(
    pod: dict[str, Any], config_map: dict[str, Any], template: Path
) -> None:
    """Make a ConfigMap the source of a pod's volume named `run`.

    Args:
        pod: the pod's spec; changed in place.
        config_map: the ConfigMap's name and items, as a volume source.
        template: the site's file, for messages.

    Raises:
        UserError: the pod has no such volume.
    """
    for volume in pod.get("volumes") or []:
        if volume.get("name") == "run":
            volume["configMap"] = config_map
            return
    raise UserError(
        f"a pod in {template} has no volume named run, mounted at {POD_CONFIG_DIR}: "
        "see cluster/kuberay/rayjob.yaml"
    )
