"""Connection to a Ray cluster, or to a Ray on this machine; nodes and autoscaler."""

import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayError, RaySystemError

from distrain.data.storage.retry import call_with_retries
from distrain.errors import RunError, UserError
from distrain.launch.allocation import Allocation, ClusterNode, to_ray_resources
from distrain.launch.ray_environment import ignore_foreign_settings, make_ray_folder
from distrain.launch.ray_versions import explain_version_mismatch
from distrain.monitor.sinks import Console

HEAD_NODE_RESOURCE = "node:__internal_head__"
"""Ray's resource of the head: a task or actor that needs a little of it runs there."""

# Answers of a head that failed to start its server for a new client.
_CLIENT_SERVER_ERRORS = (
    "Ray client server failed",
    "Initialization failure from server",
)
_MAX_CONNECT_TRIES = 4
# Seconds for a TCP connection to the head. Ray itself tries for over a minute.
_TCP_TIMEOUT_SECONDS = 5.0
# Seconds for which a head that does not answer yet is tried: it may be starting.
_PROBE_SECONDS = 15.0
# Raised when a private function of Ray's is gone or has changed.
_PRIVATE_API_ERRORS = (AttributeError, ImportError, RuntimeError, RaySystemError)
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}

# Ray's defaults: a poll every 2 s, 60 s until workers that cannot be placed are given
# up, every print twice, and a chdir.
_RAY_TRAIN_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "6",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
RAY_HEAD_ENV = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "2000",
}
"""Environment of the head with which a lost node is noticed after 8 s instead of 65."""


@contextmanager
def connect_to_ray(
    address: str | None, console: Console, *, cpus: int = 0, gpus: int = 0
) -> Iterator[None]:
    """Connect to a cluster, or start a Ray on this machine, for the block.

    A Ray that was started here is removed afterwards with all that it wrote.

    Args:
        address: of the cluster (auto, host:port, ray://host:port); None: start one.
        console: where progress is printed.
        cpus: cores that a Ray started here gives to workers.
        gpus: GPUs that a Ray started here gives to workers.

    Raises:
        UserError: no cluster answers at the address, its Ray or Python is of another
            version, or this process is connected to one already.
    """
    check_not_connected()
    _set_default_env(_RAY_TRAIN_ENV)
    with ignore_foreign_settings(address), _silence_worker_prints():
        if address is None:
            yield from _run_local_ray(cpus, gpus)
        else:
            yield from _run_client(address, console)


def check_not_connected() -> None:
    """Raise UserError if this process uses Ray: its connection is not ours to close."""
    if ray.is_initialized():
        raise UserError(
            "this process is already connected to a Ray cluster: call ray.shutdown() "
            "first"
        )


def _set_default_env(variables: Mapping[str, str]) -> None:
    """Set environment variables that the user has not set."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


@contextmanager
def _silence_worker_prints() -> Iterator[None]:
    """Suppress what Ray prints for each worker that dies; log_to_driver does not.

    A private function of Ray's is replaced for the block. If a later Ray calls another
    one, its text is visible again: nothing else depends on this.
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


def _run_client(address: str, console: Console) -> Iterator[None]:
    place = "of this machine" if address == "auto" else f"at {address}"
    console.log(f"connecting to the Ray cluster {place}")
    try:
        _probe_with_retries(address, console)
        _connect_with_retries(address, console, _QUIET)
    except (OSError, RuntimeError, ValueError) as error:
        if reason := explain_version_mismatch(address, error):
            raise UserError(reason) from None
        raise UserError(
            f"no Ray cluster answers at {address} ({summarize_error(error)}): "
            "check that Ray runs there, or pass another --address"
        ) from None
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    console.log(
        f"connected to Ray at {address}: {num_nodes} node{'s' * (num_nodes > 1)}"
    )
    try:
        yield
    finally:
        ray.shutdown()


def _probe_with_retries(address: str, console: Console) -> None:
    """Probe a cluster's head, which may be starting. Raises OSError."""

    def log_first_failure(_: OSError, failures: int) -> None:
        if failures == 1:
            seconds = f"{_PROBE_SECONDS:.0f} s"
            console.log(f"{address} does not answer yet: retrying for {seconds}")

    call_with_retries(
        lambda: _probe_address(address),
        _PROBE_SECONDS,
        should_retry=lambda error: True,
        on_retry=log_first_failure,
    )


def _probe_address(address: str) -> None:
    """Open a TCP connection to a cluster's head and close it.

    Nothing is done for an address without a port, such as auto.

    Raises:
        OSError: nobody listens there.
    """
    url = urlsplit(address if "://" in address else f"//{address}")
    if url.hostname is not None and url.port is not None:
        target = url.hostname, url.port
        with socket.create_connection(target, timeout=_TCP_TIMEOUT_SECONDS):
            return


def _connect_with_retries(
    address: str, console: Console, options: Mapping[str, Any]
) -> None:
    """Connect to a cluster; retry if its head fails to start a server for this client.

    Such a start may fail if gRPC's fork handlers run in the head: it forks while other
    threads of it use gRPC.
    """
    for tries_left in reversed(range(_MAX_CONNECT_TRIES)):
        try:
            ray.init(address=address, **options)
            return
        except (RuntimeError, ConnectionError) as error:
            # The head's error arrives as it is, or as the client's ConnectionError.
            is_known = any(text in str(error) for text in _CLIENT_SERVER_ERRORS)
            if not is_known or not tries_left:
                raise
            console.log(
                "the head failed to start a server for this client: retrying (start "
                "Ray on the head with GRPC_ENABLE_FORK_SUPPORT=0 to avoid this)"
            )


def _run_local_ray(cpus: int, gpus: int) -> Iterator[None]:
    _set_default_env(RAY_HEAD_ENV)
    # With this variable every process of Ray's compiles torch again: 50 s, not 15 s.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    folder = make_ray_folder()
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=gpus,
            include_dashboard=False,
            _temp_dir=folder,
            **_QUIET,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def list_nodes() -> list[ClusterNode]:
    """List the cluster's nodes.

    Two private functions of Ray's give details; without them the list is coarser, not
    wrong.
    """
    alive_nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    try:
        draining_ids = set(ray._private.state.state.get_draining_nodes())
    except _PRIVATE_API_ERRORS:
        # A drained node is then noticed only when it is gone.
        draining_ids = set()
    try:
        available = ray._private.state.available_resources_per_node()
    except _PRIVATE_API_ERRORS:
        # Count all that is free in the cluster as the first node's. Workers that do not
        # fit on their nodes are then found out by the attempt to place them.
        first_id = next(iter(alive_nodes))
        available = {first_id: ray.available_resources()}
    return [
        ClusterNode(
            id=node_id,
            address=node["NodeManagerAddress"],
            total_resources=node["Resources"],
            available_resources=available.get(node_id, {}),
            draining=node_id in draining_ids,
        )
        for node_id, node in alive_nodes.items()
    ]


def fetch_cluster_nodes(address: str, console: Console) -> list[ClusterNode]:
    """Connect to a cluster for a moment, and list its nodes as its head sees them.

    Raises:
        UserError: no cluster answers at the address.
        RunError: the cluster went away meanwhile.
    """
    with connect_to_ray(address, console):
        run_on_head = ray.remote(num_cpus=0, resources={HEAD_NODE_RESOURCE: 0.001})
        try:
            nodes: list[ClusterNode] = ray.get(run_on_head(list_nodes).remote())
        except RayError as error:
            raise RunError(
                f"the Ray cluster at {address} does not list its nodes: "
                f"{summarize_error(error)}"
            ) from error
    return nodes


def request_workers(
    allocation: Allocation,
    num_workers: int,
    nodes: Sequence[ClusterNode],
    worker_node_ids: Sequence[str],
) -> None:
    """Ask the cluster's autoscaler, if it has one, for so many workers.

    Args:
        allocation: the resources of a worker.
        num_workers: workers in all, those that already run included; 0: withdraw the
            last request.
        nodes: the cluster.
        worker_node_ids: the node of each worker that this run already has.
    """
    from ray.autoscaler.sdk import request_resources

    worker_resources = to_ray_resources(allocation)
    bundles = [worker_resources] * num_workers
    if not num_workers:
        request_resources(bundles=bundles)
        return

    # The autoscaler takes a request for the size of the whole cluster: what other jobs
    # hold must be asked for too, or it would take their nodes away.
    for node in nodes:
        held_by_others = {}
        for kind, amount in worker_resources.items():
            total = node.total_resources.get(kind, 0.0)
            available = node.available_resources.get(kind, 0.0)
            held_by_us = amount * worker_node_ids.count(node.id)
            held_by_others[kind] = max(0.0, total - available - held_by_us)
        if any(held_by_others.values()):
            bundles.append(held_by_others)
    request_resources(bundles=bundles)


def summarize_error(error: BaseException | None) -> str:
    """Return one sentence on an error.

    distrain's own errors are sentences; Ray's are tracebacks with long advice, of which
    the first sentence of the last line is kept.
    """
    # Ray wraps what a rank raised.
    cause = getattr(error, "_base_exc", error)
    if isinstance(cause, RunError):
        return str(cause)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    sentence = lines[-1].split(". ")[0] if lines else ""
    return sentence or type(cause).__name__
