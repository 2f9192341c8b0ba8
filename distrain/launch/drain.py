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
from distrain.launch.mailbox import drivers_here
from distrain.launch.ray_cluster import look, reason_of
from distrain.monitor.sinks import Console


def drain(console: Console, *, seconds: float) -> None:
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
    end = time.monotonic() + seconds
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
            _wait(_Drivers(console).have_ended, end, seconds)
        else:
            _tell_ray(node, seconds)
            console.event(
                f"{here['NodeManagerAddress']}: nothing new is placed here; waiting for what is at work"
            )
            _wait(lambda: not _at_work(node), end, seconds)
        console.event(f"{here['NodeManagerAddress']}: nobody works here any more")
    except RayError as error:
        raise RunError(
            f"the Ray of this host went away meanwhile: {reason_of(error)}"
        ) from error
    finally:
        ray.shutdown()


def _tell_ray(node: str, seconds: float) -> None:
    where = ("--address", ray.get_runtime_context().gcs_address, "--node-id", node)
    why = (
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "distrain drain",
    )
    command = (sys.executable, "-m", "ray.scripts.scripts", "drain-node", *where, *why)
    done = subprocess.run(  # noqa: S603
        [*command, "--deadline-remaining-seconds", str(max(1, round(seconds)))],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RunError(
            f"Ray does not let this host be drained: {' '.join(done.stderr.split())[-300:]}"
        )


def _at_work(node: str) -> bool:
    """Whether anybody holds cores or GPUs of a node."""
    kinds = ("CPU", "GPU")
    return any(
        known.id == node and any(known.free.get(k) != known.total.get(k) for k in kinds)
        for known in look()
    )


class _Drivers:
    """Sends SIGTERM to the processes of this host that drive runs on the cluster.

    One that has just been started is not seen before it has connected to the cluster.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._signalled: set[int] = set()

    def have_ended(self) -> bool:
        """Signal those that are new; return whether all have ended."""
        for pid in drivers_here():
            if pid not in self._signalled and _is_alive(pid):
                self._signalled.add(pid)
                with suppress(ProcessLookupError):  # it has ended just now
                    os.kill(pid, signal.SIGTERM)
                    self._console.event(
                        f"sent SIGTERM to process {pid}: it saves a checkpoint and ends"
                    )
        # Ray forgets a driver before its process has said how the run ended.
        return not any(_is_alive(pid) for pid in self._signalled)


def _is_alive(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return False
    return state not in "ZX"


def _wait(over: Callable[[], bool], end: float, seconds: float) -> None:
    while not over():
        if time.monotonic() > end:
            raise RunError(f"this host is still at work after {seconds:.0f} s")
        time.sleep(0.5)
