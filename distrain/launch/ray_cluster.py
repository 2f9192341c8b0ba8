"""A connection to a Ray cluster, or a Ray of our own on this machine; its nodes, and its autoscaler."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError, RaySystemError

from distrain.errors import RunError, UserError
from distrain.launch.allocation import Allocation, ClusterNode, to_ray_resources
from distrain.monitor.sinks import Console

# What the head answers when its server for a client did not start.
_CLIENT_SERVER_ERRORS = (
    "Ray client server failed",
    "Initialization failure from server",
)
_MAX_CONNECT_TRIES = 4
_PRIVATE_API_ERRORS = (AttributeError, ImportError, RuntimeError, RaySystemError)

# Ray's defaults are a poll every 2 s, 60 s for workers that cannot be placed, every print twice and a chdir.
_RAY_TRAIN_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "6",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
# Read by the head: a node that vanishes is noticed after about 8 s, not after 65.
RAY_HEAD_ENV = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "2000",
}


def _connect_with_retries(
    address: str, console: Console, options: Mapping[str, Any]
) -> None:
    """Connect to a cluster; ask again where its head failed to start a server for this client.

    Some starts fail where gRPC's fork handlers run in the head: it forks while other threads of it use gRPC.
    """
    for tries_left in reversed(range(_MAX_CONNECT_TRIES)):
        try:
            ray.init(address=address, **options)
            return
        except (
            RuntimeError,
            ConnectionError,
        ) as error:  # the head's own error, or what the client makes of it
            if not tries_left or not any(
                text in str(error) for text in _CLIENT_SERVER_ERRORS
            ):
                raise
            console.log(
                "the head failed to start a server for this client: asking again (start Ray on the head with "
                "GRPC_ENABLE_FORK_SUPPORT=0 to avoid this)"
            )


@contextmanager
def _silence_worker_prints() -> Iterator[None]:
    """Suppress what Ray prints for each worker that dies, which log_to_driver does not stop.

    A function of Ray's is replaced for the while. Where it is called otherwise one day, the text shows again.
    """
    module = ray._private.worker
    original = module.__dict__.get("print_to_stdstream")
    if original is None:
        yield
        return
    module.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        module.print_to_stdstream = original


@contextmanager
def connect_to_ray(
    address: str | None, console: Console, *, cpus: int = 0, gpus: int = 0
) -> Iterator[None]:
    """A connection to a cluster, or a Ray of our own, which is gone afterwards with all that it wrote.

    `cpus` and `gpus`: what a Ray of our own has to give to workers.
    """
    os.environ.update({k: v for k, v in _RAY_TRAIN_ENV.items() if k not in os.environ})
    with _silence_worker_prints():
        yield from _open_session(address, console, cpus, gpus)


def _open_session(
    address: str | None, console: Console, cpus: int, gpus: int
) -> Iterator[None]:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None:
        try:
            _connect_with_retries(address, console, quiet)
        except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
            raise UserError(
                f"no Ray cluster answers at {address} ({summarize_error(error)}): check the address"
            ) from None
        nodes = [node for node in ray.nodes() if node["Alive"]]
        console.log(
            f"connected to Ray at {address}: {len(nodes)} node{'s' * (len(nodes) > 1)}"
        )
        try:
            yield
        finally:
            ray.shutdown()
        return
    os.environ.update({k: v for k, v in RAY_HEAD_ENV.items() if k not in os.environ})
    # Set, it makes every process of Ray's compile torch again: 50 s instead of 15.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    folder = tempfile.mkdtemp(prefix="distrain-ray-")
    try:
        ray.init(
            num_cpus=cpus,
            num_gpus=gpus,
            include_dashboard=False,
            _temp_dir=folder,
            **quiet,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def list_nodes() -> list[ClusterNode]:
    """The cluster's nodes. Two private calls of Ray's make the view sharper; without them it is coarser, not wrong."""
    alive = {n["NodeID"]: n for n in ray.nodes() if n["Alive"]}
    try:
        draining = set(ray._private.state.state.get_draining_nodes())
    except _PRIVATE_API_ERRORS:  # a drained node is then noticed when it is gone
        draining = set()
    try:
        free = ray._private.state.available_resources_per_node()
    except (
        _PRIVATE_API_ERRORS
    ):  # all of the cluster's together: what is too much is found out by trying
        first = next(iter(alive))
        free = {first: ray.available_resources()}
    return [
        ClusterNode(
            node,
            n["NodeManagerAddress"],
            n["Resources"],
            free.get(node, {}),
            node in draining,
        )
        for node, n in alive.items()
    ]


def fetch_cluster_nodes(address: str, console: Console) -> list[ClusterNode]:
    """The nodes of a cluster, as they are seen from its head.

    Raises:
        UserError: no cluster answers there.
        RunError: it went away meanwhile.
    """
    where = {"node:__internal_head__": 0.001}
    with connect_to_ray(address, console):
        try:
            nodes: list[ClusterNode] = ray.get(
                ray.remote(num_cpus=0, resources=where)(list_nodes).remote()
            )
        except RayError as error:
            raise RunError(
                f"the Ray cluster at {address} does not say what it has: {summarize_error(error)}"
            ) from error
    return nodes


def request_workers(
    allocation: Allocation,
    num_workers: int,
    nodes: Sequence[ClusterNode],
    worker_node_ids: Sequence[str],
) -> None:
    """Tell the cluster's autoscaler, where there is one, how many workers are wanted; 0: none any more.

    It takes this for the size of the whole cluster, so that what others hold is asked for too.

    Args:
        share: what a worker needs.
        workers: how many.
        nodes: the cluster.
        held: nodes of our own workers, by id.
    """
    from ray.autoscaler.sdk import request_resources

    bundles = [to_ray_resources(allocation)] * num_workers
    for node in nodes if num_workers else ():
        ours = {
            kind: each * worker_node_ids.count(node.id)
            for kind, each in to_ray_resources(allocation).items()
        }
        others = {
            kind: node.total_resources.get(kind, 0.0)
            - node.available_resources.get(kind, 0.0)
            - own
            for kind, own in ours.items()
        }
        if any(amount > 0 for amount in others.values()):
            bundles.append({kind: max(0.0, amount) for kind, amount in others.items()})
    request_resources(bundles=bundles)


def summarize_error(error: BaseException | None) -> str:
    """What a person needs to know of an error: ours are sentences, Ray's are tracebacks and walls of advice."""
    cause = getattr(error, "_base_exc", error)  # Ray wraps what a rank raised
    if isinstance(cause, RunError):
        return str(cause)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    sentence = lines[-1].split(". ")[0] if lines else ""
    return sentence or type(cause).__name__
