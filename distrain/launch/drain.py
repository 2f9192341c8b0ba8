"""Taking this host out of its Ray cluster: runs on it save first, and go on with the others."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import ray
from ray.exceptions import RayError

from distrain.errors import RunError, UserError
from distrain.launch.mailbox import list_local_drivers
from distrain.launch.ray_cluster import list_nodes, summarize_error
from distrain.monitor.sinks import Console


def drain_ray_host(console: Console, *, timeout_seconds: float) -> None:
    """Have nothing new placed on this host, and wait until nobody works on it.

    On the cluster's head, which takes the cluster with it, the processes that drive runs from there get SIGTERM,
    at which they save a checkpoint and end. To Ray and to KubeRay their jobs have failed, so that what starts jobs
    again may do so elsewhere.

    Args:
        console: what a person sees.
        seconds: until when the host is given up all the same.

    Raises:
        UserError: no Ray runs on this host.
        RunError: the host is still at work after `seconds`.
    """
    end = time.monotonic() + timeout_seconds
    # Explicitly: unset, parts of Ray follow the token file and others do not.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, TimeoutError, RuntimeError, ValueError):
        raise UserError("no Ray runs on this host: there is nothing to drain") from None
    try:
        node = ray.get_runtime_context().get_node_id()
        (here,) = (known for known in ray.nodes() if known["NodeID"] == node)
        if "node:__internal_head__" in here["Resources"]:
            _wait_until(_DriverStopper(console).signal_and_poll, end, timeout_seconds)
        else:
            _request_ray_drain(node, timeout_seconds)
            console.log(
                f"{here['NodeManagerAddress']}: nothing new is placed here; waiting for what is at work"
            )
            _wait_until(lambda: not _is_node_busy(node), end, timeout_seconds)
        console.log(f"{here['NodeManagerAddress']}: nobody works here any more")
    except RayError as error:
        raise RunError(
            f"the Ray of this host went away meanwhile: {summarize_error(error)}"
        ) from error
    finally:
        ray.shutdown()


def _request_ray_drain(node_id: str, timeout_seconds: float) -> None:
    where = ("--address", ray.get_runtime_context().gcs_address, "--node-id", node_id)
    why = (
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "distrain drain",
    )
    command = (sys.executable, "-m", "ray.scripts.scripts", "drain-node", *where, *why)
    done = subprocess.run(  # noqa: S603
        [*command, "--deadline-remaining-seconds", str(max(1, round(timeout_seconds)))],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RunError(
            f"Ray does not let this host be drained: {' '.join(done.stderr.split())[-300:]}"
        )


def _is_node_busy(node_id: str) -> bool:
    """Whether anybody holds cores or GPUs of a node."""
    kinds = ("CPU", "GPU")
    return any(
        known.id == node_id
        and any(
            known.available_resources.get(k) != known.total_resources.get(k)
            for k in kinds
        )
        for known in list_nodes()
    )


class _DriverStopper:
    """Sends SIGTERM to the processes of this host that drive runs on the cluster.

    One that has just been started is not seen before it has connected to the cluster.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._signaled_pids: set[int] = set()

    def signal_and_poll(self) -> bool:
        """Signal those that are new; return whether all have ended."""
        for pid in list_local_drivers():
            if pid not in self._signaled_pids and _is_alive(pid):
                self._signaled_pids.add(pid)
                with suppress(ProcessLookupError):  # it has ended just now
                    os.kill(pid, signal.SIGTERM)
                    self._console.log(
                        f"sent SIGTERM to process {pid}: it saves a checkpoint and ends"
                    )
        # Ray forgets a driver before its process has said how the run ended.
        return not any(_is_alive(pid) for pid in self._signaled_pids)


def _is_alive(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return False
    return state not in "ZX"


def _wait_until(
    is_done: Callable[[], bool], deadline: float, timeout_seconds: float
) -> None:
    while not is_done():
        if time.monotonic() > deadline:
            raise RunError(f"this host is still at work after {timeout_seconds:.0f} s")
        time.sleep(0.5)
