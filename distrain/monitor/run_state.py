"""State of a run as the record of its newest attempt shows it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from distrain.data.storage.store import Store
from distrain.distributed.process import is_dead_local_process
from distrain.rundir.lease import read_newest_attempt


class RunState(NamedTuple):
    """State of a run."""

    text: str
    has_ended: bool
    """No process trains it, so its metrics pages need not answer."""


def read_run_state(store: Store) -> RunState:
    """Read from a run directory whether a run is running, or how it ended.

    An attempt that was killed on another machine counts as running, since from here it
    looks like one that is cut off.

    Raises:
        OSError: the directory cannot be read.
    """
    newest = read_newest_attempt(store)
    if newest is None:
        return RunState("not started", False)
    attempt, record = newest
    if record["ended"]:
        # After an attempt that stopped or failed, the next one may be starting.
        has_finished = record.get("outcome") == "finished"
        return RunState(_describe_end(attempt, record), has_finished)
    owner = f"attempt {attempt}, {record['who']}"
    if is_dead_local_process(str(record["process"])):
        return RunState(
            f"killed: {owner}, died without releasing the run directory", True
        )
    return RunState(f"running: {owner}", False)


def _describe_end(attempt: int, record: Mapping[str, Any]) -> str:
    """Describe how an attempt ended that has released the run directory."""
    outcome = record.get("outcome")
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
