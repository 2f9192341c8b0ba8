"""Lease of a run directory: one attempt at a time may write to it.

It works on any file system or bucket. `attempts/003.json` belongs to attempt 3: it is
created once, by the first process that tries to, and renewed by that owner alone. A
higher number supersedes all lower ones, so a worker that was cut off and comes back
late finds that it must stop.
"""

import getpass
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from distrain.data.storage.store import Store
from distrain.distributed.process import get_process_identity, is_dead_local_process
from distrain.errors import AttemptError, UserError
from distrain.rundir import files

RENEW_INTERVAL_SECONDS = 10.0
"""Seconds between two heartbeats of the owner, each of which increments a counter."""
LOST_AFTER_SECONDS = 30.0
"""A lease expires if its counter has not changed for this long, in seconds.

The clock is that of the claimant: clocks of different machines are never compared.
"""
_EMPTY_RECORD = {
    "session": "",
    "who": "an unknown owner",
    "process": "",
    "from_step": None,
    "counter": -1,
    "ended": False,
}


class Lease:
    """Right of one attempt to write to the run directory.

    Close it, or use it in a `with`.
    """

    def __init__(self, store: Store, attempt: int, record: dict[str, Any]) -> None:
        self.attempt = attempt
        self._store = store
        self._record = record
        # How training ended; it stays empty until then.
        self._outcome: dict[str, Any] = {}
        # The renewing thread and the training thread both write the record.
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._renew_loop, name="distrain-lease", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        self.close(error)

    def record_start(self, step: int, world_size: int) -> None:
        """Record the step that this attempt resumes from, and its number of ranks.

        From now on, what earlier attempts save beyond that step does not count.
        """
        self._write_record(from_step=step, workers=world_size)

    def set_outcome(self, outcome: str, step: int, steps: int) -> None:
        """Set how training ended, for the record that `close` writes.

        Args:
            outcome: "finished" (early, if steps are left), or "stopped" on request.
            step: steps done.
            steps: of the whole run.
        """
        self._outcome = {"outcome": outcome, "step": step, "steps": steps}

    def raise_if_superseded(self) -> None:
        """Check the lease. Call it before writing a file that attempts share.

        Raises:
            AttemptError: a newer attempt has taken over.
        """
        newest = max(_list_attempt_numbers(self._store), default=0)
        if newest > self.attempt:
            raise AttemptError(
                f"attempt {newest} has taken over {self._store.redacted_url}, since "
                f"attempt {self.attempt} (this one) did not renew its lease: this "
                "attempt writes nothing more"
            )

    def close(self, error: BaseException | None = None) -> None:
        """Release the run directory, so that the next attempt need not wait.

        Args:
            error: what ended the attempt, if it failed.
        """
        self._closing.set()
        self._thread.join()
        if error is not None:
            # A mistake of the user's was found before training.
            outcome = "refused" if isinstance(error, UserError) else "failed"
            # One line: errors of other libraries may have several.
            text = " ".join(str(error).split()) or type(error).__name__
            self._outcome = {"outcome": outcome, "error": text}
        try:
            self._write_record(ended=True, failed=error is not None, **self._outcome)
        except OSError:
            # The next attempt waits until the counter has not changed for a while.
            return

    def _write_record(self, **changes: Any) -> None:
        with self._lock:
            self._record |= changes
            self._store.write(
                files.attempt_path(self.attempt), json.dumps(self._record).encode()
            )

    def _renew_loop(self) -> None:
        while not self._closing.wait(RENEW_INTERVAL_SECONDS):
            try:
                self._write_record(counter=self._record["counter"] + 1)
            except OSError:
                # The storage is full or away: retry at the next renewal. If another
                # attempt takes over meanwhile, `raise_if_superseded` finds out.
                continue


def acquire_lease(store: Store, launch_id: str, log: Callable[[str], None]) -> Lease:
    """Take over a run directory for a new attempt.

    Args:
        store: the run directory.
        launch_id: id of the launch; an attempt of the same launch is superseded at
            once.
        log: gets a line if it has to wait.

    Raises:
        UserError: another launch uses the directory.
        OSError: the directory cannot be written to.
    """
    while True:
        # Wait if the newest attempt is another launch's and may still be running.
        records = read_attempts(store)
        newest = max(records, default=0)
        may_be_running = (
            newest
            and not records[newest]["ended"]
            and records[newest]["session"] != launch_id
        )
        if may_be_running and not _wait_for_owner_end(
            store, newest, records[newest], log
        ):
            continue

        # Create the next record. Of several processes that try, exactly one succeeds.
        record = {
            "session": launch_id,
            **_describe_process(),
            "from_step": None,
            "counter": 0,
            "ended": False,
        }
        try:
            store.create_exclusive(
                files.attempt_path(newest + 1), json.dumps(record).encode()
            )
        except FileExistsError:
            # Another process was faster: start over with its record.
            continue
        return Lease(store, newest + 1, record)


def read_attempts(store: Store) -> dict[int, dict[str, Any]]:
    """Return the record of each attempt, by number. Raises OSError."""
    return {
        number: _read_record(store, number) for number in _list_attempt_numbers(store)
    }


def iter_newest_attempts(store: Store) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and record of each attempt, the newest first. Raises OSError."""
    for number in reversed(_list_attempt_numbers(store)):
        yield number, _read_record(store, number)


def _read_record(store: Store, attempt: int) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(store.read(files.attempt_path(attempt)))
    except ValueError:
        # Created, and not filled yet.
        return dict(_EMPTY_RECORD)
    return record


def is_rolled_back(
    records: Mapping[int, Mapping[str, Any]], attempt: int, step: int
) -> bool:
    """Return whether a later attempt resumed from before a step of this attempt.

    What the attempt saved at that step was rolled back then, and does not count.

    Args:
        records: records of all attempts, by number.
        attempt: number of the attempt.
        step: step at which it saved something.
    """
    starts = (records[number]["from_step"] for number in records if number > attempt)
    return any(start is not None and start < step for start in starts)


def count_failures(
    records: Mapping[int, Mapping[str, Any]], launch_id: str, step: int
) -> int:
    """Count the latest consecutive attempts that failed without progress.

    Args:
        records: records of all earlier attempts, by number.
        launch_id: id of the launch; an attempt of another one ends the count.
        step: step that all of them resumed from.
    """
    count = 0
    for number in sorted(records, reverse=True):
        record = records[number]
        # A killed attempt has no entry `failed`, and has not ended.
        failed = record.get("failed", not record["ended"])
        is_same_launch = record["session"] == launch_id
        if not is_same_launch or record["from_step"] != step or not failed:
            break
        count += 1
    return count


def count_restarts_and_resizes(
    records: Mapping[int, Mapping[str, Any]],
) -> tuple[int, int]:
    """Count attempts that followed a failed one, and those with another world size.

    Attempts that never recorded a start step (`record_start`) are left out.
    """
    restarts = 0
    resizes = 0
    started = [
        records[number]
        for number in sorted(records)
        if records[number]["from_step"] is not None
    ]
    for before, record in itertools.pairwise(started):
        restarts += bool(before.get("failed", not before["ended"]))
        resizes += before.get("workers") != record.get("workers")
    return restarts, resizes


def _wait_for_owner_end(
    store: Store, attempt: int, record: Mapping[str, Any], log: Callable[[str], None]
) -> bool:
    """Wait until an attempt's owner is gone, or its lease has expired.

    Returns:
        True: the owner ended, died, or did not renew its lease in time. False: the
        record has changed, so read it again.

    Raises:
        UserError: the owner has renewed its lease, or a newer attempt is running.
    """
    # On this machine, the kernel knows whether the process is dead.
    if is_dead_local_process(str(record["process"])):
        return True

    # Elsewhere, watch the counter. A record is usually filled at once after it was
    # created, so an empty one gets a second before the wait is logged.
    is_empty = record["counter"] == _EMPTY_RECORD["counter"]
    start_time = time.monotonic()
    has_logged = False
    while time.monotonic() < start_time + LOST_AFTER_SECONDS:
        log_after_seconds = 1.0 if is_empty else 0.0
        if not has_logged and time.monotonic() > start_time + log_after_seconds:
            log(
                f"the run directory may be in use by attempt {attempt} "
                f"({record['who']}): waiting {LOST_AFTER_SECONDS:.0f} s to see whether "
                "it is still running"
            )
            has_logged = True
        time.sleep(0.1 if is_empty else 0.5)

        records = read_attempts(store)
        if attempt not in records:
            # The process that created it could not fill it, and has removed it.
            return False
        newest = max(records)
        if records[newest]["ended"]:
            return True
        has_renewed = records[attempt]["counter"] != record["counter"]
        if newest != attempt or has_renewed:
            # Filled now: it may be of the same launch, which need not wait.
            if is_empty:
                return False
            raise UserError(
                f"{store.redacted_url} is in use by {records[newest]['who']} (attempt "
                f"{newest}): stop that run first, or choose another run directory, "
                "run=..."
            )
    return True


def _describe_process() -> dict[str, str]:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    user = _get_user_name()
    host = socket.gethostname()
    return {
        "who": f"{user} on {host}, process {os.getpid()}, since {now}",
        "process": get_process_identity(os.getpid()) or "",
    }


def _get_user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container's user may have no name.
        return f"user {os.getuid()}"


def _list_attempt_numbers(store: Store) -> list[int]:
    return sorted(
        int(match[1])
        for name in store.list_names(files.ATTEMPTS_DIR)
        if (match := files.ATTEMPT_PATTERN.fullmatch(name))
    )
