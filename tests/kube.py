"""What the Kubernetes API takes, checked strictly: an unknown field is an error, as with `kubectl --validate=strict`.

Core kinds are checked against the Python client's models. Of KubeRay's kinds these are the fields of ray.io/v1 (API
reference of KubeRay 1.5 and 1.6) that are of use here; what only newer or older operators know is left out.
"""

import re
from typing import Any

from kubernetes import client

CUSTOM = {
    "RayJob": {
        "apiVersion": "str",
        "kind": "str",
        "metadata": "V1ObjectMeta",
        "spec": "RayJobSpec",
    },
    "RayJobSpec": {
        "activeDeadlineSeconds": "int",
        "backoffLimit": "int",
        "clusterSelector": "Dict[str, str]",
        "entrypoint": "str",
        "entrypointNumCpus": "float",
        "entrypointNumGpus": "float",
        "entrypointResources": "str",
        "jobId": "str",
        "metadata": "Dict[str, str]",
        "rayClusterSpec": "RayClusterSpec",
        "runtimeEnvYAML": "str",
        "shutdownAfterJobFinishes": "bool",
        "submissionMode": "str",
        "submitterPodTemplate": "V1PodTemplateSpec",
        "suspend": "bool",
        "ttlSecondsAfterFinished": "int",
    },
    "RayCluster": {
        "apiVersion": "str",
        "kind": "str",
        "metadata": "V1ObjectMeta",
        "spec": "RayClusterSpec",
    },
    "RayClusterSpec": {
        "authOptions": "AuthOptions",
        "autoscalerOptions": "AutoscalerOptions",
        "enableInTreeAutoscaling": "bool",
        "headGroupSpec": "HeadGroupSpec",
        "headServiceAnnotations": "Dict[str, str]",
        "rayVersion": "str",
        "suspend": "bool",
        "workerGroupSpecs": "List[WorkerGroupSpec]",
    },
    "AuthOptions": {"mode": "str"},
    "AutoscalerOptions": {
        "env": "List[V1EnvVar]",
        "envFrom": "List[V1EnvFromSource]",
        "idleTimeoutSeconds": "int",
        "image": "str",
        "imagePullPolicy": "str",
        "resources": "V1ResourceRequirements",
        "securityContext": "V1SecurityContext",
        "upscalingMode": "str",
        "version": "str",
        "volumeMounts": "List[V1VolumeMount]",
    },
    "HeadGroupSpec": {
        "enableIngress": "bool",
        "headService": "V1Service",
        "rayStartParams": "Dict[str, str]",
        "serviceType": "str",
        "template": "V1PodTemplateSpec",
    },
    "WorkerGroupSpec": {
        "groupName": "str",
        "idleTimeoutSeconds": "int",
        "maxReplicas": "int",
        "minReplicas": "int",
        "numOfHosts": "int",
        "rayStartParams": "Dict[str, str]",
        "replicas": "int",
        "template": "V1PodTemplateSpec",
    },
    # monitoring.coreos.com/v1
    "PodMonitor": {
        "apiVersion": "str",
        "kind": "str",
        "metadata": "V1ObjectMeta",
        "spec": "PodMonitorSpec",
    },
    "PodMonitorSpec": {
        "jobLabel": "str",
        "namespaceSelector": "NamespaceSelector",
        "podMetricsEndpoints": "List[PodMetricsEndpoint]",
        "podTargetLabels": "List[str]",
        "sampleLimit": "int",
        "selector": "V1LabelSelector",
    },
    "NamespaceSelector": {"any": "bool", "matchNames": "List[str]"},
    "PodMetricsEndpoint": {
        "honorLabels": "bool",
        "interval": "str",
        "path": "str",
        "port": "str",
        "scheme": "str",
        "scrapeTimeout": "str",
    },
}
REQUIRED = {
    "RayClusterSpec": {"headGroupSpec"},
    "HeadGroupSpec": {"template"},
    "WorkerGroupSpec": {"groupName", "template"},
    "PodMonitorSpec": {"selector", "podMetricsEndpoints"},
}
PLAIN = {"str": str, "int": int, "bool": bool}
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")


def problems(document: dict[str, Any]) -> list[str]:
    """What an API server would refuse a manifest for."""
    kind = document.get("kind", "")
    model = kind if kind in CUSTOM else f"V1{kind}"
    if model not in CUSTOM and not hasattr(client, model):
        return [f"no kind {kind!r}"]
    return list(_check(document, model, kind))


def _check(value: Any, of: str, where: str):
    if found := re.fullmatch(r"List\[(.+)\]", of):
        if not isinstance(value, list):
            yield f"{where}: no list"
            return
        for number, item in enumerate(value):
            yield from _check(item, found[1], f"{where}[{number}]")
    elif found := re.fullmatch(r"Dict\[(\w+), (\w+)\]", of):
        if not isinstance(value, dict):
            yield f"{where}: no mapping"
            return
        for key, item in value.items():
            yield from _check(key, found[1], f"{where}: key {key!r}")
            yield from _check(item, found[2], f"{where}.{key}")
            if (
                of == "Dict[str, str]"
                and ".resources." in where
                and not _QUANTITY.fullmatch(str(item))
            ):
                yield f"{where}.{key}: {item!r} is no quantity"
    elif of in PLAIN:
        if type(value) is not PLAIN[of]:
            yield f"{where}: {value!r} is no {of}"
    elif of == "float":
        if type(value) not in (int, float):
            yield f"{where}: {value!r} is no number"
    elif of == "datetime":
        # kubectl sends null where there is none yet.
        if value is not None and not isinstance(value, str):
            yield f"{where}: {value!r} is no time"
    elif of == "object":
        if not isinstance(value, (str, int)):
            yield f"{where}: {value!r} is neither text nor number"
    else:
        yield from _fields(value, of, where)


def _is_required(model: Any, field: str) -> bool:
    """The client's models refuse None for a field that is required."""
    instance = model.__new__(model)
    instance.local_vars_configuration = client.Configuration()
    try:
        setattr(instance, field, None)
    except ValueError:
        return True
    return False


def _fields(value: Any, of: str, where: str):
    if of in CUSTOM:
        known, required = CUSTOM[of], REQUIRED.get(of, set())
    else:
        model = getattr(client, of)
        names = model.attribute_map
        known = {
            names[field]: kind.replace("list[", "List[").replace("dict[", "Dict[")
            for field, kind in model.openapi_types.items()
        }
        required = {names[field] for field in names if _is_required(model, field)}
    if not isinstance(value, dict):
        yield f"{where}: no mapping"
        return
    yield from (f"{where}: lacks {name}" for name in sorted(required - value.keys()))
    for name, item in value.items():
        if name not in known:
            yield f"{where}: unknown field {name!r}"
        else:
            yield from _check(item, known[name], f"{where}.{name}")
