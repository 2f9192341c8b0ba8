"""State of a run as the record of its newest attempt shows it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from distrain.data.storage.store import Store
from distrain.distributed.process import is_dead_local_process
from distrain.rundir.lease import iter_newest_attempts


class RunState(NamedTuple):
    """State of a run."""

    text: str
    has_ended: bool
    """No process trains it now, so its metrics pages need not answer."""


def read_run_state(store: Store) -> RunState:
    """Read from a run directory whether a run is running, or how it ended.

    An attempt that was killed on another machine counts as running, since from here it
    looks like one that is cut off.

    Raises:
        OSError: the directory cannot be read.
    """
    refusal = ""
    for attempt, record in iter_newest_attempts(store):
        # An attempt that was refused has changed nothing: the one before counts.
        if record.get("outcome") != "refused":
            text, has_ended = _describe_attempt(attempt, record)
            return RunState(f"{text}; {refusal}" if refusal else text, has_ended)
        if not refusal:
            # What happened, without the remedy behind the colon.
            reason = record["error"].partition(": ")[0]
            refusal = f"attempt {attempt} was refused and changed nothing: {reason}"
    return RunState(refusal or "not started", bool(refusal))


def _describe_attempt(attempt: int, record: Mapping[str, Any]) -> RunState:
    """Describe a run by its newest attempt that was not refused."""
    if record["ended"]:
        return RunState(_describe_end(attempt, record), True)
    owner = f"attempt {attempt}, {record['who']}"
    if is_dead_local_process(str(record["process"])):
        return RunState(
            f"killed: {owner}, died without releasing the run directory", True
        )
    return RunState(f"running: {owner}", False)


def _describe_end(attempt: int, record: Mapping[str, Any]) -> str:
    """Describe how an attempt ended that has released the run directory."""
    outcome = record.get("outcome")
    if outcome == "finished" and record["step"] < record["steps"]:
        return f"finished early: {record['step']} of {record['steps']} steps"
    if outcome == "finished":
        return f"finished: {record['steps']} steps"
    if outcome == "stopped":
        return (
            f"attempt {attempt} stopped after step {record['step']} of "
            f"{record['steps']}"
        )
    if outcome == "failed":
        return f"attempt {attempt} failed: {record['error']}"
    # Versions before this one wrote no outcome.
    return f"attempt {attempt} {'failed' if record.get('failed') else 'ended'}"
