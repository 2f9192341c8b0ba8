"""Who may write to a run directory: one attempt at a time, by number, on any file system or bucket.

`attempts/003.json` belongs to attempt 3: it is created once, by whoever comes first, and renewed by its owner alone. A
higher number supersedes all lower ones, so a worker that was cut off and comes back late finds that it must stop.
"""

import getpass
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from distrain.data.storage.store import Store
from distrain.distributed.process import get_process_identity, is_dead_local_process
from distrain.errors import AttemptError, UserError
from distrain.rundir import files

RENEW_INTERVAL_SECONDS = 10.0
"""Seconds between two renewals of the owner's counter."""
LOST_AFTER_SECONDS = 30.0
"""Seconds for which the counter of a lost owner stands still, by a newcomer's clock."""
_EMPTY_RECORD = {
    "session": "",
    "who": "somebody",
    "process": "",
    "from_step": None,
    "counter": -1,
    "ended": False,
}


class Lease:
    """One attempt's right to the run directory. Close it, or use it in a `with`."""

    def __init__(self, store: Store, attempt: int, record: dict[str, Any]) -> None:
        self.attempt = attempt
        self._store, self._record = store, record
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._thread = threading.Thread(
            target=self._renew_loop, name="distrain-lease", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def record_start(self, step: int, world_size: int) -> None:
        """Note where this attempt goes on from, and with how many: what older ones save beyond it does not count."""
        self._write_record(from_step=step, workers=world_size)

    def raise_if_superseded(self) -> None:
        """Ask before anything is written that is not this attempt's own.

        Raises:
            AttemptError: a newer attempt has taken over.
        """
        newest = max(_list_attempt_numbers(self._store), default=0)
        if newest > self.attempt:
            raise AttemptError(
                f"attempt {self.attempt} was cut off, and attempt {newest} has taken over {self._store.redacted_url}: "
                "nothing more is written by this one"
            )

    def close(self, *, failed: bool = False) -> None:
        """Give the run directory back, so that the next attempt need not wait."""
        self._closing.set()
        self._thread.join()
        try:
            self._write_record(ended=True, failed=failed)
        except OSError:
            return  # the next owner waits until the counter has stood still

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
                continue  # full or away: tried again; whoever takes over meanwhile is found out by `check`


def acquire_lease(store: Store, session: str, log: Callable[[str], None]) -> Lease:
    """Take the run directory over for a new attempt.

    Args:
        store: the run directory.
        session: names the launch; an attempt of the same launch is superseded at once.
        tell: is told why it takes a while.

    Raises:
        UserError: another launch is at work there.
        OSError: the directory cannot be written to.
    """
    while True:
        records = read_attempts(store)
        number = max(records, default=0)
        other = (
            number
            and not records[number]["ended"]
            and records[number]["session"] != session
        )
        if other and not _wait_for_owner_end(store, number, records[number], log):
            continue
        record = {
            "session": session,
            **_describe_process(),
            "from_step": None,
            "counter": 0,
            "ended": False,
        }
        try:
            store.create_exclusive(
                files.attempt_path(number + 1), json.dumps(record).encode()
            )
        except FileExistsError:  # somebody else was faster: look who it is
            continue
        return Lease(store, number + 1, record)


def read_attempts(store: Store) -> dict[int, dict[str, Any]]:
    """The record of each attempt, by number. Raises OSError."""
    records = {}
    for number in _list_attempt_numbers(store):
        try:
            records[number] = json.loads(store.read(files.attempt_path(number)))
        except ValueError:  # created, not yet filled
            records[number] = dict(_EMPTY_RECORD)
    return records


def is_superseded(
    records: Mapping[int, Mapping[str, Any]], attempt: int, step: int
) -> bool:
    """Whether what an attempt saved at a step was given up: a later one went on from a step before it."""
    starts = (records[number]["from_step"] for number in records if number > attempt)
    return any(start is not None and start < step for start in starts)


def count_failures(
    records: Mapping[int, Mapping[str, Any]], session: str, step: int
) -> int:
    """How many attempts of this launch, the newest in a row, started from `step` and failed without a checkpoint."""
    count = 0
    for number in sorted(records, reverse=True):
        record = records[number]
        failed = record.get("failed", not record["ended"])
        if record["session"] != session or record["from_step"] != step or not failed:
            break
        count += 1
    return count


def count_restarts_and_resizes(
    records: Mapping[int, Mapping[str, Any]],
) -> tuple[int, int]:
    """How many attempts followed one that failed, and how many had another number of workers than the one before."""
    restarts = resizes = 0
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
    """Return True once an attempt's owner is known to be gone, False as soon as it turns out who it is."""
    if is_dead_local_process(str(record["process"])):
        return True
    unknown = record["counter"] == _EMPTY_RECORD["counter"]
    began, told = time.monotonic(), False
    while time.monotonic() < began + LOST_AFTER_SECONDS:
        if (
            not told and time.monotonic() > began + unknown
        ):  # a record is filled at once, as a rule
            wait = f"waiting {LOST_AFTER_SECONDS:.0f} s to see whether it is at work"
            log(f"attempt {attempt} ({record['who']}) did not end: {wait}")
            told = True
        time.sleep(0.1 if unknown else 0.5)
        now = read_attempts(store)
        if attempt not in now:  # whoever created it could not fill it
            return False
        if now[max(now)]["ended"]:
            return True
        if max(now) != attempt or now[attempt]["counter"] != record["counter"]:
            if unknown:
                return False
            raise UserError(
                f"{store.redacted_url} is in use by {now[max(now)]['who']} (attempt {max(now)}): "
                "stop that run first, or choose another run directory, run=..."
            )
    return True


def _describe_process() -> dict[str, str]:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return {
        "who": f"{_get_user_name()} on {socket.gethostname()}, process {os.getpid()}, since {now}",
        "process": get_process_identity(os.getpid()) or "",
    }


def _get_user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"user {os.getuid()}"


def _list_attempt_numbers(store: Store) -> list[int]:
    return sorted(
        int(match[1])
        for name in store.list_names(files.ATTEMPTS_DIR)
        if (match := files.ATTEMPT_PATTERN.fullmatch(name))
    )
