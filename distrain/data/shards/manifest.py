"""The manifest of a data set: its shards, with range and checksum of every row group, its classes and colours."""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distrain.data.shards.stats import ColorStatistics
from distrain.data.storage.retry import is_transient
from distrain.data.storage.store import Store
from distrain.errors import AttemptError, UserError

MANIFEST_FILE = "manifest.json"
_FORMAT_VERSION = "distrain-shards-2"

Layout = Literal["distrain", "parquet", "tar"]
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
    """What `distrain index` found out about each row of a group that others wrote."""

    label: NDArray[np.int32]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    crc32c: NDArray[np.uint32]
    """Of the image file."""
    start: NDArray[np.int64]
    """Where the image file lies, from the group's first byte on; in a tar."""
    size: NDArray[np.int64]
    """Bytes of the image file."""
    bad: Mapping[int, str]
    """Reason by row of what does not decode. Such a row keeps its place and has no weight."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: each column as its numbers, little-endian (4, 4, 4, 4, 8 and 8 bytes), in base 64."""
        columns = {
            name: base64.b64encode(getattr(self, name).astype(kind).tobytes()).decode()
            for name, kind in _INDEX_DTYPES.items()
        }
        return {
            **columns,
            "bad": {str(row): reason for row, reason in self.bad.items()},
        }

    @staticmethod
    def from_dict(tree: Mapping[str, Any]) -> "RowIndex":
        """What `to_tree` made."""
        columns = {
            name: np.frombuffer(base64.b64decode(tree[name]), kind)
            for name, kind in _INDEX_DTYPES.items()
        }
        return RowIndex(
            **columns, bad={int(row): reason for row, reason in tree["bad"].items()}
        )


@dataclass(frozen=True)
class RowGroup:
    """One row group: bytes start to end of its shard."""

    rows: int
    start: int
    end: int
    crc32c: int
    index: RowIndex | None = None
    """Its rows, where the shard itself does not say what they are."""
    number: int = -1
    """Of the row group in a Parquet file."""


@dataclass(frozen=True)
class Shard:
    """One file."""

    path: str
    bytes: int
    groups: tuple[RowGroup, ...]
    sha256: str | None = None
    """Of shards that `pack` wrote."""
    footer_start: int = 0
    """Of a Parquet file."""
    footer_crc32c: int = 0
    version: str | None = None
    """The ETag of an object that others wrote, where its store has one."""


_STATISTICS_KEYS = ("mean", "covariance", "eigenvalues", "eigenvectors")


@dataclass(frozen=True, eq=False)
class Manifest:
    """What a data set is."""

    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    """Class names, by label."""
    image_size: tuple[int, int] | None
    """Height and width of every image in pixels; None: they differ."""
    encoding: Literal["jpeg", "raw"]
    """jpeg: image files, mostly JPEG; raw: binary PPM files of one size, whose pixels are there as they are."""
    verified: bool
    """Every file was decoded whole when it was written or indexed; false: decoding a file whole is its verdict."""
    statistics: ColorStatistics
    layout: Layout = "distrain"
    """distrain: the shards of `pack`; parquet and tar: files of others, read as they are."""
    image_column: str = "image.bytes"
    """Of Parquet files."""
    shards_url: str | None = None
    """URL of the shards, where they do not lie beside the manifest."""

    @property
    def row_groups(self) -> list[tuple[Shard, int]]:
        """Every row group as (shard, place inside it), in the order of sample ids."""
        return [(shard, i) for shard in self.shards for i in range(len(shard.groups))]

    @property
    def rows_per_group(self) -> NDArray[np.int64]:
        """Rows of each row group."""
        return np.array(
            [group.rows for shard in self.shards for group in shard.groups], np.int64
        )

    @property
    def num_rows(self) -> int:
        """Samples in the data set."""
        return sum(group.rows for shard in self.shards for group in shard.groups)

    @property
    def bad_samples(self) -> dict[int, str]:
        """Reason by sample id of images that do not decode, as far as the manifest knows."""
        found, first = dict[int, str](), 0
        for shard in self.shards:
            for group in shard.groups:
                if group.index is not None:
                    found.update(
                        {first + row: reason for row, reason in group.index.bad.items()}
                    )
                first += group.rows
        return found

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content: where the data set lies does not matter."""
        return hashlib.sha256(
            json.dumps({**self._to_dict(), "at": None}).encode()
        ).hexdigest()

    def to_json(self) -> str:
        """The manifest as it is stored."""
        return json.dumps(self._to_dict(), indent=1)

    def _to_dict(self) -> dict[str, Any]:
        colours = self.statistics
        return {
            "format": _FORMAT_VERSION,
            "layout": self.layout,
            "at": self.shards_url,
            "rows": self.num_rows,
            "classes": self.classes,
            "size": self.image_size,
            "encoding": self.encoding,
            "proved": self.verified,
            "image_column": self.image_column,
            "mean": colours.mean.tolist(),
            "std": colours.std.tolist(),
            "covariance": colours.covariance.tolist(),
            "eigenvalues": colours.eigenvalues.tolist(),
            "eigenvectors": colours.eigenvectors.tolist(),
            "shards": [shard_to_dict(shard) for shard in self.shards],
        }

    @staticmethod
    def load(store: Store, retry_seconds: float = 0.0) -> "Manifest":
        """Read the manifest of a data set; `patience` is for how many seconds a store may not answer.

        Raises:
            UserError: there is none, it is not one, or it holds nothing to learn from.
            AttemptError: the store does not answer.
        """
        try:
            tree = json.loads(store.read(MANIFEST_FILE, retry_seconds=retry_seconds))
        except FileNotFoundError:
            what = f"no {MANIFEST_FILE} in it" if store.exists() else "nothing there"
            raise UserError(
                f"no data set at {store.redacted_url} ({what}): check the URL, or make one with distrain pack or index"
            ) from None
        except OSError as error:
            kind = AttemptError if is_transient(error) else UserError
            raise kind(
                f"cannot read the data set at {store.redacted_url}: {error}"
            ) from None
        except ValueError:
            raise UserError(
                f"{store.redacted_url}/{MANIFEST_FILE} is not JSON: pack the data set again"
            ) from None
        try:
            if tree["format"] != _FORMAT_VERSION:
                raise KeyError(_FORMAT_VERSION)
            if not tree.keys() >= set(_STATISTICS_KEYS):
                raise UserError(
                    f"{store.redacted_url}/{MANIFEST_FILE} has no colour statistics, which normalising and PCA colour need: "
                    "distrain stats shows those of a data set; pack or index this one again"
                )
            colours = (np.array(tree[name]) for name in _STATISTICS_KEYS)
            manifest = Manifest(
                shards=tuple(shard_from_dict(shard) for shard in tree["shards"]),
                classes=tuple(tree["classes"]),
                image_size=tree["size"] and (tree["size"][0], tree["size"][1]),
                encoding=tree["encoding"],
                verified=tree["proved"],
                statistics=ColorStatistics(*colours),
                layout=tree["layout"],
                image_column=tree["image_column"],
                shards_url=tree["at"],
            )
        except UserError:
            raise
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{store.redacted_url}/{MANIFEST_FILE} is not a {_FORMAT_VERSION} manifest: pack the data set again"
            ) from None
        if manifest.num_rows == 0:
            raise UserError(
                f"the data set at {store.redacted_url} is empty: pack one with images in it"
            )
        if len(manifest.classes) < 2:
            raise UserError(
                f"the data set at {store.redacted_url} has one class, so there is nothing to tell apart"
            )
        return manifest


def shard_to_dict(shard: Shard) -> dict[str, Any]:
    """A shard for JSON."""
    tree = {name: value for name, value in vars(shard).items() if value is not None}
    return {**tree, "groups": [_group_to_dict(group) for group in shard.groups]}


def _group_to_dict(group: RowGroup) -> dict[str, Any]:
    if group.index is not None:
        return {**vars(group), "index": group.index.to_dict()}
    return {
        name: value
        for name, value in vars(group).items()
        if name not in ("index", "number")
    }


def shard_from_dict(tree: Mapping[str, Any]) -> Shard:
    """What `shard_tree` made."""
    return Shard(
        **{**tree, "groups": tuple(_group_from_dict(group) for group in tree["groups"])}
    )


def _group_from_dict(tree: Mapping[str, Any]) -> RowGroup:
    if "index" in tree:
        return RowGroup(**{**tree, "index": RowIndex.from_dict(tree["index"])})
    return RowGroup(**tree)
