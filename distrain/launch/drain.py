"""Taking this host out of its Ray cluster: runs on it save first, and go on with the others."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress

import ray

from distrain.errors import RunError, UserError
from distrain.launch.mailbox import drivers_here
from distrain.launch.ray_cluster import look
from distrain.monitor.sinks import Console


def drain(console: Console, *, seconds: float) -> None:
    """Have nothing new placed on this host, and wait until nobody works on it.

    On the cluster's head, which takes the cluster with it, the runs that are led from there are told to save and end
    (SIGTERM): to Ray and to KubeRay their jobs have failed, so that what starts jobs again may do so elsewhere.

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
            with closing(_Drivers(console)) as drivers:
                _wait(drivers.have_ended, end, seconds)
        else:
            _tell_ray(node, seconds)
            console.event(f"{here['NodeManagerAddress']}: nothing new is placed here; waiting for what is at work")
            _wait(lambda: not _at_work(node), end, seconds)
        console.event(f"{here['NodeManagerAddress']}: nobody works here any more")
    finally:
        ray.shutdown()


def _tell_ray(node: str, seconds: float) -> None:
    where = ("--address", ray.get_runtime_context().gcs_address, "--node-id", node)
    why = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "distrain drain")
    command = (sys.executable, "-m", "ray.scripts.scripts", "drain-node", *where, *why)
    done = subprocess.run(  # noqa: S603
        [*command, "--deadline-remaining-seconds", str(max(1, round(seconds)))],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RunError(f"Ray does not let this host be drained: {' '.join(done.stderr.split())[-300:]}")


def _at_work(node: str) -> bool:
    """Whether anybody holds cores or GPUs of a node."""
    kinds = ("CPU", "GPU")
    return any(known.id == node and any(known.free.get(k) != known.total.get(k) for k in kinds) for known in look())


class _Drivers:
    """The processes of this host that drive runs on the cluster, and are told to end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: dict[int, int] = {}
        """A descriptor of each process (pidfd), by its id."""

    def have_ended(self) -> bool:
        """Tell those that are new to save and end; whether all have ended."""
        for pid in drivers_here():
            if pid not in self._told:
                with suppress(ProcessLookupError):  # it has ended meanwhile
                    self._told[pid] = os.pidfd_open(pid)
                    signal.pidfd_send_signal(self._told[pid], signal.SIGTERM)
                    self._console.event(f"process {pid}: told to save and end")
        alive = list(self._told.values())
        ended, _, _ = select.select(alive, [], [], 0)
        return len(ended) == len(alive)

    def close(self) -> None:
        """Forget them."""
        for descriptor in self._told.values():
            os.close(descriptor)


def _wait(over: Callable[[], bool], end: float, seconds: float) -> None:
    while not over():
        if time.monotonic() > end:
            raise RunError(f"this host is still at work after {seconds:.0f} s")
        time.sleep(0.5)
