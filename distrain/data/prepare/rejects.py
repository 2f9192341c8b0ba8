"""What is left out of a data set: the list in its folder, and groups to print."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from distrain.data.prepare.source import RETRY_SECONDS, Reject
from distrain.data.storage.store import Store

REJECTS_FILE = "rejects.jsonl"
_NUM_EXAMPLES = 3
_NUMBER = re.compile(r"0x[0-9a-f]+|\d[\d,]*")


class RejectGroup(NamedTuple):
    """Rejects with one reason."""

    num_images: int
    reason: str
    """The reason; a number that differs within the group is replaced by `...`."""
    examples: list[str]
    """Names of the first few."""
    is_complete: bool
    """Whether the examples are all of them."""


def count_images(rejects: Iterable[Reject]) -> int:
    """Return the number of images that are left out."""
    return sum(reject.num_images for reject in rejects)


def group_rejects(rejects: Iterable[Reject]) -> list[RejectGroup]:
    """Group rejects by reason, the largest group first.

    Reasons that differ in their numbers alone, such as sizes, are one group.
    """
    rejects_by_kind: dict[str, list[Reject]] = {}
    for reject in rejects:
        kind = _NUMBER.sub("0", reject.reason)
        rejects_by_kind.setdefault(kind, []).append(reject)

    groups = [
        RejectGroup(
            count_images(members),
            _join_reasons([member.reason for member in members]),
            [member.name for member in members[:_NUM_EXAMPLES]],
            len(members) <= _NUM_EXAMPLES,
        )
        for members in rejects_by_kind.values()
    ]
    return sorted(groups, key=lambda group: -group.num_images)


def describe_main_reason(rejects: Iterable[Reject]) -> str:
    """Return how many images are left out for the most frequent reason, and for which.

    Args:
        rejects: at least one.
    """
    main = group_rejects(rejects)[0]
    return f"{main.num_images:,} x {main.reason}"


def _join_reasons(reasons: Sequence[str]) -> str:
    """Return the common text of reasons that differ in their numbers alone."""
    # One set per number of the text: what stands there in any of the reasons.
    numbers = [
        set(column) for column in zip(*map(_NUMBER.findall, reasons), strict=True)
    ]
    columns = iter(numbers)

    def replace_number(match: re.Match[str]) -> str:
        return match[0] if len(next(columns)) == 1 else "..."

    return _NUMBER.sub(replace_number, reasons[0])


def write_rejects(store: Store, rejects: Sequence[Reject]) -> None:
    """Write the list of rejects, one JSON object per line; no file if it is empty."""
    if rejects:
        lines = "".join(f"{json.dumps(_to_dict(reject))}\n" for reject in rejects)
        store.write(REJECTS_FILE, lines.encode(), retry_seconds=RETRY_SECONDS)
    # A list that an earlier attempt left would be wrong now.
    elif store.exists(REJECTS_FILE):
        store.remove(REJECTS_FILE)


def read_rejects(store: Store) -> list[Reject]:
    """Read the list of rejects of a finished data set. Raises OSError."""
    if not store.exists(REJECTS_FILE):
        return []
    data = store.read(REJECTS_FILE, retry_seconds=RETRY_SECONDS)
    trees = [json.loads(line) for line in data.splitlines()]
    return [
        Reject(tree["path"], tree["reason"], tree.get("num_images", 1))
        for tree in trees
    ]


def _to_dict(reject: Reject) -> dict[str, str | int]:
    tree: dict[str, str | int] = {"path": reject.name, "reason": reject.reason}
    if reject.num_images != 1:
        tree["num_images"] = reject.num_images
    return tree
