"""A connection to a Ray cluster, or a Ray of our own on this machine."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from distrain.config import Config
from distrain.errors import RunError, UserError
from distrain.monitor.sinks import Console

# Ray's defaults are a poll every 2 s, 60 s for workers that cannot be placed, every print twice and a chdir.
_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "6",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
# Read by the head: a node that vanishes is noticed after about 8 s, not after 65.
HEAD_SETTINGS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "2000",
}


def _join(address: str, console: Console, options: Mapping[str, Any]) -> None:
    """Connect to a cluster; a head that is too busy to start a server for this client in Ray's 30 s is asked twice."""
    try:
        ray.init(address=address, **options)
    except (RuntimeError, ConnectionError) as error:  # the head's own error, or what the client makes of it
        if "Ray client server failed" not in str(error):
            raise
        console.event("the head is too busy to serve this client: asking again")
        ray.init(address=address, **options)


@contextmanager
def connected(config: Config, address: str | None, console: Console) -> Iterator[None]:
    """A connection to a cluster, or a Ray of our own, which is gone afterwards with all that it wrote."""
    os.environ.update({k: v for k, v in _TRAIN_SETTINGS.items() if k not in os.environ})
    # A wall of text for each worker that dies, whatever log_to_driver says; where it has moved to, it shows again.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None:
        try:
            _join(address, console, quiet)
        except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
            raise UserError(f"no Ray cluster answers at {address} ({reason_of(error)}): check the address") from None
        nodes = [node for node in ray.nodes() if node["Alive"]]
        console.event(f"connected to Ray at {address}: {len(nodes)} node{'s' * (len(nodes) > 1)}")
        try:
            yield
        finally:
            ray.shutdown()
        return
    os.environ.update({k: v for k, v in HEAD_SETTINGS.items() if k not in os.environ})
    # Set, it makes every process of Ray's compile torch again: 50 s instead of 15.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    workers, cluster = config.cluster.workers[1], config.cluster
    folder = tempfile.mkdtemp(prefix="distrain-ray-")
    try:
        ray.init(num_cpus=workers * cluster.cpus_per_worker, include_dashboard=False, _temp_dir=folder, **quiet)
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def reason_of(error: BaseException | None) -> str:
    """What a person needs to know of an error: ours are sentences, Ray's are tracebacks and walls of advice."""
    cause = getattr(error, "_base_exc", error)  # Ray wraps what a rank raised
    if isinstance(cause, RunError):
        return str(cause)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    sentence = lines[-1].split(". ")[0] if lines else ""
    return sentence or type(cause).__name__
