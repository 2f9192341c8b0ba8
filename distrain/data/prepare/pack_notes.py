"""Files in the target of a pack from which an interrupted pack resumes.

`.pack/plan.json` holds everything that the shards depend on, and each finished shard
has a note beside it. Both are removed when the data set is complete.
"""

import json
from typing import NamedTuple

from distrain.data.prepare.source import RETRY_SECONDS, Reject
from distrain.data.shards.entries import Shard, shard_from_dict, shard_to_dict
from distrain.data.shards.manifest import MANIFEST_FILE
from distrain.data.shards.stats import PixelMoments
from distrain.data.storage.retry import PERMANENT_ERRORS
from distrain.data.storage.store import Store
from distrain.errors import UserError

_NOTES_FOLDER = ".pack"
_PLAN_FILE = f"{_NOTES_FOLDER}/plan.json"
SIDES_FILE = f"{_NOTES_FOLDER}/sides.npz"
"""Which rows are for validation, where a pack divides a source."""


class ShardNote(NamedTuple):
    """Record of a finished shard."""

    shard: Shard | None
    """None: all of its images were rejected."""
    moments: PixelMoments
    rejects: list[Reject]


def format_shard_name(shard_number: int) -> str:
    """Return the name of a shard without an extension, such as shard-00007."""
    return f"shard-{shard_number:05d}"


def is_pack_target(store: Store) -> bool:
    """Return whether a folder holds a data set, or an unfinished pack of one."""
    return store.exists(MANIFEST_FILE) or store.exists(_PLAN_FILE)


def has_notes(store: Store) -> bool:
    """Return whether a folder holds the notes of a pack."""
    return store.exists(_PLAN_FILE)


def claim_target(store: Store, plan: bytes, num_shards: int) -> dict[int, ShardNote]:
    """Claim the target for a pack, and return the notes of its finished shards.

    Args:
        store: the target.
        plan: everything that the shards depend on, as JSON.
        num_shards: number of shards of the pack.

    Raises:
        UserError: the target holds a data set or part of another pack, or cannot be
            written to.
    """
    existing_plan = None
    if store.exists(_PLAN_FILE):
        existing_plan = store.read(_PLAN_FILE, retry_seconds=RETRY_SECONDS)
    # A finished data set of the same plan has been looked for before. With the plan
    # in its notes, a version of distrain that wrote no other was killed at the end.
    if store.exists(MANIFEST_FILE) and existing_plan != plan:
        raise UserError(
            f"{store.redacted_url} holds a data set already, of other images, options "
            "or versions: choose another place, or delete it"
        )
    if existing_plan is None:
        try:
            store.write(_PLAN_FILE, plan, retry_seconds=RETRY_SECONDS)
        except PERMANENT_ERRORS as error:
            raise UserError(
                f"cannot write to {store.redacted_url} ({error.strerror or error}): "
                "choose another target, or check its permissions"
            ) from None
        return {}
    if existing_plan != plan:
        raise UserError(
            f"{store.redacted_url} holds an unfinished pack of other images, options "
            "or versions: choose another place, or delete it"
        )

    # Remove files that were being written when their process was killed.
    for name in store.list_names():
        if name.endswith(".partial"):
            store.remove(name)

    # Read the notes of the shards that are finished.
    existing_files = set(store.list_names(_NOTES_FOLDER))
    notes = {}
    for shard_number in range(num_shards):
        file = f"{format_shard_name(shard_number)}.json"
        if file in existing_files:
            data = store.read(f"{_NOTES_FOLDER}/{file}", retry_seconds=RETRY_SECONDS)
            notes[shard_number] = _parse_note(data)
    return notes


def count_finished_shards(store: Store) -> int:
    """Return the number of shards from which a pack would resume. Raises OSError."""
    return sum(name.startswith("shard-") for name in store.list_names(_NOTES_FOLDER))


def write_note(store: Store, shard_number: int, note: ShardNote) -> None:
    """Mark a shard as finished. Raises OSError."""
    tree = {
        "shard": None if note.shard is None else shard_to_dict(note.shard),
        "moments": vars(note.moments),
        "rejects": note.rejects,
    }
    store.write(
        f"{_NOTES_FOLDER}/{format_shard_name(shard_number)}.json",
        json.dumps(tree).encode(),
        retry_seconds=RETRY_SECONDS,
    )


def _parse_note(data: bytes) -> ShardNote:
    tree = json.loads(data)
    shard = None if tree["shard"] is None else shard_from_dict(tree["shard"])
    moments = PixelMoments(**tree["moments"])
    return ShardNote(shard, moments, [Reject(*pair) for pair in tree["rejects"]])


def remove_notes(store: Store) -> None:
    """Remove the plan and all notes, once they are not needed to resume."""
    store.remove(_NOTES_FOLDER)
