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
from distrain.distributed.process import is_dead_here, process_identity
from distrain.errors import AttemptError, UserError
from distrain.rundir import files

RENEWED_EVERY = 10.0
"""Seconds between two renewals of the owner's counter."""
STILL_FOR = 30.0
"""Seconds for which the counter of a lost owner stands still, by a newcomer's clock."""
_NOT_FILLED = {
    "session": "",
    "who": "somebody",
    "process": "",
    "from_step": None,
    "counter": -1,
    "ended": False,
}


class Lease:
    """One attempt's right to the run directory. Close it, or use it in a `with`."""

    def __init__(self, store: Store, number: int, record: dict[str, Any]) -> None:
        self.number = number
        self._store, self._record = store, record
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._thread = threading.Thread(
            target=self._renew, name="distrain-lease", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def started_from(self, step: int, workers: int) -> None:
        """Note where this attempt goes on from, and with how many: what older ones save beyond it does not count."""
        self._write(from_step=step, workers=workers)

    def check(self) -> None:
        """Ask before anything is written that is not this attempt's own.

        Raises:
            AttemptError: a newer attempt has taken over.
        """
        newest = max(_numbers(self._store), default=0)
        if newest > self.number:
            raise AttemptError(
                f"attempt {self.number} was cut off, and attempt {newest} has taken over {self._store.name}: "
                "nothing more is written by this one"
            )

    def close(self, *, failed: bool = False) -> None:
        """Give the run directory back, so that the next attempt need not wait."""
        self._closing.set()
        self._thread.join()
        try:
            self._write(ended=True, failed=failed)
        except OSError:
            return  # the next owner waits until the counter has stood still

    def _write(self, **changes: Any) -> None:
        with self._lock:
            self._record |= changes
            self._store.write(
                files.attempt(self.number), json.dumps(self._record).encode()
            )

    def _renew(self) -> None:
        while not self._closing.wait(RENEWED_EVERY):
            try:
                self._write(counter=self._record["counter"] + 1)
            except OSError:
                continue  # full or away: tried again; whoever takes over meanwhile is found out by `check`


def claim(store: Store, session: str, tell: Callable[[str], None]) -> Lease:
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
        records = attempts(store)
        number = max(records, default=0)
        other = (
            number
            and not records[number]["ended"]
            and records[number]["session"] != session
        )
        if other and not _has_ended(store, number, records[number], tell):
            continue
        record = {
            "session": session,
            **_self(),
            "from_step": None,
            "counter": 0,
            "ended": False,
        }
        try:
            store.create(files.attempt(number + 1), json.dumps(record).encode())
        except FileExistsError:  # somebody else was faster: look who it is
            continue
        return Lease(store, number + 1, record)


def attempts(store: Store) -> dict[int, dict[str, Any]]:
    """The record of each attempt, by number. Raises OSError."""
    records = {}
    for number in _numbers(store):
        try:
            records[number] = json.loads(store.read(files.attempt(number)))
        except ValueError:  # created, not yet filled
            records[number] = dict(_NOT_FILLED)
    return records


def superseded(
    records: Mapping[int, Mapping[str, Any]], attempt: int, step: int
) -> bool:
    """Whether what an attempt saved at a step was given up: a later one went on from a step before it."""
    starts = (records[number]["from_step"] for number in records if number > attempt)
    return any(start is not None and start < step for start in starts)


def failures(records: Mapping[int, Mapping[str, Any]], session: str, step: int) -> int:
    """How many attempts of this launch, the newest in a row, started from `step` and failed without a checkpoint."""
    count = 0
    for number in sorted(records, reverse=True):
        record = records[number]
        failed = record.get("failed", not record["ended"])
        if record["session"] != session or record["from_step"] != step or not failed:
            break
        count += 1
    return count


def restarts_and_resizes(records: Mapping[int, Mapping[str, Any]]) -> tuple[int, int]:
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


def _has_ended(
    store: Store, number: int, record: Mapping[str, Any], tell: Callable[[str], None]
) -> bool:
    """Return True once an attempt's owner is known to be gone, False as soon as it turns out who it is."""
    if is_dead_here(str(record["process"])):
        return True
    unknown = record["counter"] == _NOT_FILLED["counter"]
    began, told = time.monotonic(), False
    while time.monotonic() < began + STILL_FOR:
        if (
            not told and time.monotonic() > began + unknown
        ):  # a record is filled at once, as a rule
            wait = f"waiting {STILL_FOR:.0f} s to see whether it is at work"
            tell(f"attempt {number} ({record['who']}) did not end: {wait}")
            told = True
        time.sleep(0.1 if unknown else 0.5)
        now = attempts(store)
        if number not in now:  # whoever created it could not fill it
            return False
        if now[max(now)]["ended"]:
            return True
        if max(now) != number or now[number]["counter"] != record["counter"]:
            if unknown:
                return False
            raise UserError(
                f"{store.name} is in use by {now[max(now)]['who']} (attempt {max(now)}): "
                "stop that run first, or choose another run directory, run=..."
            )
    return True


def _self() -> dict[str, str]:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return {
        "who": f"{_user()} on {socket.gethostname()}, process {os.getpid()}, since {now}",
        "process": process_identity(os.getpid()) or "",
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"user {os.getuid()}"


def _numbers(store: Store) -> list[int]:
    return sorted(
        int(match[1])
        for name in store.list(files.ATTEMPTS)
        if (match := files.ATTEMPT_NAME.fullmatch(name))
    )
