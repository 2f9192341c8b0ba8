"""Entries of a manifest: shards, their row groups, and the rows of others' files."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

HASH_BYTES = 16
"""Bytes of the hash of an image's pixels."""
# Little-endian on every machine: these are the types as they are stored.
_INDEX_DTYPES: dict[str, Any] = {
    "label": np.dtype("<i4"),
    "height": np.dtype("<i4"),
    "width": np.dtype("<i4"),
    "crc32c": np.dtype("<u4"),
    "start": np.dtype("<i8"),
    "size": np.dtype("<i8"),
}


@dataclass(frozen=True, eq=False)
class RowIndex:
    """Rows of a group that others wrote, as `distrain index` found them."""

    label: NDArray[np.int32]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    crc32c: NDArray[np.uint32]
    """CRC-32C of the image file."""
    start: NDArray[np.int64]
    """Offset of the image file from the group's first byte; used in a tar."""
    size: NDArray[np.int64]
    """Bytes of the image file."""
    bad: Mapping[int, str]
    """Reason by row of images that do not decode. Such a row keeps its sample id, and
    has weight zero."""

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON.

        Each column is its numbers, little-endian (4, 4, 4, 4, 8 and 8 bytes each), in
        base 64.
        """
        columns = {}
        for name, dtype in _INDEX_DTYPES.items():
            data = getattr(self, name).astype(dtype).tobytes()
            columns[name] = base64.b64encode(data).decode()
        # As strings, because JSON has no integer keys.
        bad = {str(row): reason for row, reason in self.bad.items()}
        return {**columns, "bad": bad}

    @staticmethod
    def from_dict(tree: Mapping[str, Any]) -> "RowIndex":
        """Return the index from the dict that `to_dict` makes."""
        columns = {}
        for name, dtype in _INDEX_DTYPES.items():
            data = base64.b64decode(tree[name])
            columns[name] = np.frombuffer(data, dtype)
        bad = {int(row): reason for row, reason in tree["bad"].items()}
        return RowIndex(**columns, bad=bad)


@dataclass(frozen=True)
class RowGroup:
    """One row group: bytes start to end of its shard."""

    rows: int
    start: int
    end: int
    crc32c: int
    index: RowIndex | None = None
    """Description of its rows, if the shard itself does not have one."""
    number: int = -1
    """Index of the row group in a Parquet file that others wrote; -1 elsewhere."""
    pixel_hashes: bytes | None = None
    """Hash of each row's pixels, `HASH_BYTES` each; zeros for a bad row. None: made
    before there were hashes."""


@dataclass(frozen=True)
class Shard:
    """One file of a data set."""

    path: str
    bytes: int
    groups: tuple[RowGroup, ...]
    sha256: str | None = None
    """SHA-256 of the file, if `pack` wrote it."""
    footer_start: int = 0
    """Offset of the footer in a Parquet file; 0 in a tar."""
    footer_crc32c: int = 0
    version: str | None = None
    """ETag of an object that others wrote, if its store has ETags."""

    def describe_group(self, group_index: int) -> str:
        """Return the file and the number of a row group in it, for messages.

        A Parquet file's own number may be above the index in `groups`, which lacks the
        row groups that `index` left out. Others have no number of their own.
        """
        number = self.groups[group_index].number
        return f"{self.path} row group {group_index if number < 0 else number}"


def shard_to_dict(shard: Shard, *, include_hashes: bool = True) -> dict[str, Any]:
    """Return a dict of a shard for JSON, with or without the hashes of pixels."""
    # Leave out keys that do not apply: the SHA-256 or the ETag.
    tree = {name: value for name, value in vars(shard).items() if value is not None}
    tree["groups"] = [_group_to_dict(group, include_hashes) for group in shard.groups]
    return tree


def _group_to_dict(group: RowGroup, include_hashes: bool) -> dict[str, Any]:
    tree = dict(vars(group))
    hashes = tree.pop("pixel_hashes")
    if include_hashes and hashes is not None:
        tree["pixel_hashes"] = base64.b64encode(hashes).decode()
    if group.index is not None:
        tree["index"] = group.index.to_dict()
    else:
        # Groups of `pack` have neither.
        del tree["index"]
        del tree["number"]
    return tree


def shard_from_dict(tree: Mapping[str, Any]) -> Shard:
    """Return the shard from the dict that `shard_to_dict` makes."""
    groups = tuple(_group_from_dict(group) for group in tree["groups"])
    fields = {**tree, "groups": groups}
    return Shard(**fields)


def _group_from_dict(tree: Mapping[str, Any]) -> RowGroup:
    fields = dict(tree)
    if "index" in fields:
        fields["index"] = RowIndex.from_dict(fields["index"])
    if "pixel_hashes" in fields:
        hashes = base64.b64decode(fields["pixel_hashes"])
        if len(hashes) != HASH_BYTES * fields["rows"]:
            raise ValueError(len(hashes))
        fields["pixel_hashes"] = hashes
    return RowGroup(**fields)
