"""State of a run as its run directory shows it: running, or how it ended."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from distrain.data.storage.store import Store
from distrain.distributed.process import is_dead_local_process
from distrain.rundir import files
from distrain.rundir.lease import LOST_AFTER_SECONDS, read_newest_attempt

# Position in a line that `format_record` wrote: steps done, and steps of the run.
_POSITION_PATTERN = re.compile(r"  step (\d+)/(\d+)  ")
# Last line of the log of an attempt that raised.
_ERROR_PATTERN = re.compile(r"\S+ (?:error: )?(.*)")


class RunState(NamedTuple):
    """State of a run."""

    text: str
    has_ended: bool
    """No process trains it, so its metrics pages need not answer."""


def read_run_state(store: Store, now: float) -> RunState:
    """Find out from a run directory whether a run is running, or how it ended.

    Args:
        store: the run directory.
        now: Unix time.

    Raises:
        OSError: the directory cannot be read.
    """
    newest = read_newest_attempt(store)
    if newest is None:
        return RunState("not started", False)
    attempt, record = newest
    if record["ended"]:
        return RunState(_describe_end(store, attempt, record), True)

    # The owner has not released the lease.
    owner = f"attempt {attempt}, {record['who']}"
    if is_dead_local_process(str(record["process"])):
        return RunState(f"killed: {owner}, is dead and did not save its end", True)
    # On another machine, a dead process looks like one that is cut off.
    last_renewal = store.get_modified_time(files.attempt_path(attempt))
    if last_renewal is not None and now - last_renewal > LOST_AFTER_SECONDS:
        silence = f"no sign of life for {now - last_renewal:.0f} s from {owner}"
        return RunState(
            f"{silence}: it was killed, or cannot reach the run directory", False
        )
    return RunState(f"running: {owner}", False)


def _describe_end(store: Store, attempt: int, record: Mapping[str, Any]) -> str:
    """Describe how an attempt ended that has released its lease."""
    log_path = _find_newest_log(store)
    lines = store.read(log_path).decode().splitlines() if log_path else []
    if not record.get("failed"):
        # Only the log has the number of steps of the run; training from Python alone
        # writes none.
        positions = [
            match for line in lines if (match := _POSITION_PATTERN.search(line))
        ]
        if not positions:
            return "ended without an error"
        step, steps = positions[-1].groups()
        return "finished" if step == steps else f"stopped after step {step} of {steps}"

    # The error is the last line of the log, which is closed after the lease. An attempt
    # that failed before training has written none.
    error = ""
    record_time = store.get_modified_time(files.attempt_path(attempt)) or 0.0
    if lines and (store.get_modified_time(log_path) or 0.0) >= record_time:
        match = _ERROR_PATTERN.fullmatch(lines[-1])
        error = match[1] if match else ""
    evidence = _find_divergence(store, record["from_step"] or 0)
    if evidence is not None and (not error or evidence in error):
        return f"diverged: see {evidence}"
    return f"failed: {error}" if error else "failed"


def _find_newest_log(store: Store) -> str:
    """Return the name of the newest log, "" if there is none."""
    names = [name for name in store.list_names() if files.LOG_PATTERN.fullmatch(name)]
    # Their names hold the time, so that they sort by it.
    return names[-1] if names else ""


def _find_divergence(store: Store, from_step: int) -> str | None:
    """Return the name of the evidence on a divergence after a step, if there is one."""
    for name in store.list_names():
        match = files.NOT_FINITE_PATTERN.fullmatch(name)
        if match and int(match[1]) > from_step:
            return name
    return None
