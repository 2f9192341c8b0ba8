"""Drain this host of its Ray cluster: its runs save, then resume on the other nodes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import ray
from ray.exceptions import RayError

from distrain.errors import RunError, UserError
from distrain.launch.mailbox import list_local_drivers
from distrain.launch.ray_cluster import (
    HEAD_NODE_RESOURCE,
    check_not_connected,
    list_nodes,
    summarize_error,
)
from distrain.launch.ray_environment import ignore_foreign_settings
from distrain.monitor.sinks import Console, PlainConsole


def drain(seconds: float = 240.0, *, console: Console | None = None) -> None:
    """Keep new work off this host, and wait until it is idle.

    The end of the head is the end of its cluster. On the head, the processes that drive
    runs from there get SIGTERM instead: they save a checkpoint and end. For Ray and
    KubeRay their jobs have failed, so that a supervisor of jobs may start them again
    elsewhere.

    Args:
        seconds: time after which it gives up.
        console: where progress is printed. Default: stdout.

    Raises:
        UserError: Ray is not running on this host, or this process is connected to it
            already.
        RunError: the host is still busy after that time, or Ray failed or did not
            answer.
    """
    check_not_connected()
    deadline = time.monotonic() + seconds
    console = console or PlainConsole(sys.stdout)
    # Explicitly: if it is unset, parts of Ray use the token file and others do not.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    _connect_to_ray(seconds)
    try:
        node_id = ray.get_runtime_context().get_node_id()
        (node,) = (node for node in ray.nodes() if node["NodeID"] == node_id)
        address = node["NodeManagerAddress"]
        if HEAD_NODE_RESOURCE in node["Resources"]:
            stopper = _DriverStopper(console)
            _wait_until(stopper.signal_and_poll, deadline, seconds)
        else:
            # The drivers see the drained node, save, and resume without it.
            _request_ray_drain(node_id, seconds)
            console.log(
                f"{address}: no new work is placed here; waiting until this node is "
                "idle"
            )
            _wait_until(lambda: not _is_node_busy(node_id), deadline, seconds)
        console.log(f"{address}: drained, no work is left on this node")
    except RayError as error:
        raise RunError(
            f"Ray on this host failed during the drain: {summarize_error(error)}"
        ) from error
    finally:
        ray.shutdown()


def _connect_to_ray(timeout_seconds: float) -> None:
    """Connect to the Ray of this host.

    Raises:
        UserError: Ray does not run on this host.
        RunError: its head does not answer in time.
    """
    errors: list[BaseException] = []

    def connect() -> None:
        try:
            with ignore_foreign_settings("auto"):
                ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        except BaseException as error:
            errors.append(error)

    # On a thread: Ray tries for minutes, and has no shorter limit.
    thread = threading.Thread(target=connect, name="distrain-connect", daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    if thread.is_alive():
        address = os.environ.get("RAY_ADDRESS")
        place = f" at {address}" if address else ""
        raise RunError(
            f"Ray's head{place} did not answer within {timeout_seconds:.0f} s, so "
            "nothing was drained: check that the head runs, or end Ray on this host"
        )
    try:
        if errors:
            raise errors[0]
    except (ConnectionError, TimeoutError, RuntimeError, ValueError):
        raise UserError(
            "Ray is not running on this host: there is nothing to drain"
        ) from None


def _request_ray_drain(node_id: str, timeout_seconds: float) -> None:
    """Run `ray drain-node`, Ray's public interface for it."""
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
    command += ["--address", address, "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "distrain drain"]
    # Ray takes whole seconds, and at least one.
    command += ["--deadline-remaining-seconds", str(max(1, round(timeout_seconds)))]
    process = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, check=False
    )
    if process.returncode:
        reason = " ".join(process.stderr.split())[-300:]
        raise RunError(f"Ray refused to drain this host: {reason}")


def _is_node_busy(node_id: str) -> bool:
    """Return True if a job holds cores or GPUs of a node."""
    for node in list_nodes():
        if node.id != node_id:
            continue
        for kind in ("CPU", "GPU"):
            if node.available_resources.get(kind) != node.total_resources.get(kind):
                return True
    return False


class _DriverStopper:
    """Sends SIGTERM to the processes of this host that drive runs on the cluster.

    A process that has just been started is not seen before it is connected to the
    cluster.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._signaled_pids: set[int] = set()

    def signal_and_poll(self) -> bool:
        """Send SIGTERM to new drivers; return True if all that got it have ended."""
        for pid in list_local_drivers():
            if pid not in self._signaled_pids and _is_alive(pid):
                self._signaled_pids.add(pid)
                # It may have ended just now: then there is nothing to signal or log.
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                    self._console.log(
                        f"sent SIGTERM to process {pid}: it saves a checkpoint and ends"
                    )
        # Ask the processes, not Ray: it forgets a driver before its process has
        # reported how the run ended.
        return not any(_is_alive(pid) for pid in self._signaled_pids)


def _is_alive(pid: int) -> bool:
    """Return True if a process exists and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return False
    return state not in "ZX"


def _wait_until(
    is_done: Callable[[], bool], deadline: float, timeout_seconds: float
) -> None:
    """Poll twice per second. Raises RunError after the deadline (monotonic clock)."""
    while not is_done():
        if time.monotonic() > deadline:
            raise RunError(
                f"this host is still busy after {timeout_seconds:.0f} s: "
                "drain it again with a larger --seconds"
            )
        time.sleep(0.5)
