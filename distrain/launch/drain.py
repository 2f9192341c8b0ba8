"""Taking this host out of its Ray cluster: runs on it save first, and go on with the others."""

import os
import subprocess
import sys
import time

import ray

from distrain.errors import RunError, UserError
from distrain.launch.room import look
from distrain.launch.submit import ENDED, Jobs
from distrain.monitor.sinks import Console


def drain(console: Console, *, seconds: float) -> None:
    """Have nothing new placed on this host, and wait until nobody works on it.

    On the cluster's head, which takes the cluster with it, all jobs of distrain's are stopped: they save first.

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
        dashboard = ray.init(address="auto", log_to_driver=False, logging_level="ERROR").dashboard_url
    except ConnectionError:
        raise UserError("no Ray runs on this host: there is nothing to drain") from None
    try:
        context = ray.get_runtime_context()
        node, head = context.get_node_id(), context.gcs_address
        (here,) = (known for known in ray.nodes() if known["NodeID"] == node)
        if "node:__internal_head__" in here["Resources"]:
            _stop_jobs(dashboard, console, end)
            return
        where = ("--address", head, "--node-id", node)
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
        console.event(f"{here['NodeManagerAddress']}: nothing new is placed here; waiting for what is at work")
        while any(known.id == node and known.free != known.total for known in look()):
            if time.monotonic() > end:
                raise RunError(f"this host is still at work after {seconds:.0f} s")
            time.sleep(0.5)
        console.event(f"{here['NodeManagerAddress']}: nobody works here any more")
    finally:
        ray.shutdown()


def _stop_jobs(dashboard: str, console: Console, end: float) -> None:
    jobs = Jobs(dashboard)
    for job in jobs.list():
        if job.status not in ENDED:
            jobs.stop(job.id, console, patience=end - time.monotonic())
