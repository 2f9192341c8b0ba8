"""The manifest of a data set: its shards, with range and checksum of every row group, its classes and colours."""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distrain.data.stats import Statistics
from distrain.data.store import Store, may_pass
from distrain.errors import AttemptError, UserError

MANIFEST = "manifest.json"
_FORMAT = "distrain-shards-1"


@dataclass(frozen=True)
class Group:
    """One row group: bytes start to end of its shard."""

    rows: int
    start: int
    end: int
    crc32c: int


@dataclass(frozen=True)
class Shard:
    """One Parquet file."""

    path: str
    bytes: int
    sha256: str
    footer_start: int
    footer_crc32c: int
    groups: tuple[Group, ...]


@dataclass(frozen=True, eq=False)
class Manifest:
    """What a data set is."""

    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    """Class names, by label."""
    size: tuple[int, int] | None
    """Height and width of every image in pixels; None: they differ."""
    encoding: Literal["jpeg", "raw"]
    """jpeg: image files, mostly JPEG; raw: binary PPM files of one size, whose pixels are there as they are."""
    proved: bool
    """Every file was decoded whole when it was written; false: decoding a file whole is its verdict."""
    statistics: Statistics

    @property
    def groups(self) -> list[tuple[Shard, int]]:
        """Every row group as (shard, number inside it), in the order of sample ids."""
        return [(shard, i) for shard in self.shards for i in range(len(shard.groups))]

    @property
    def group_rows(self) -> NDArray[np.int64]:
        """Rows of each row group."""
        return np.array([group.rows for shard in self.shards for group in shard.groups], np.int64)

    @property
    def rows(self) -> int:
        """Samples in the data set."""
        return sum(group.rows for shard in self.shards for group in shard.groups)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content: where the data set lies does not matter."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The manifest as it is stored."""
        tree = {
            "format": _FORMAT,
            "rows": self.rows,
            "classes": self.classes,
            "size": self.size,
            "encoding": self.encoding,
            "proved": self.proved,
            "mean": self.statistics.mean.tolist(),
            "covariance": self.statistics.covariance.tolist(),
            "shards": [asdict(shard) for shard in self.shards],
        }
        return json.dumps(tree, indent=1)

    @staticmethod
    def load(store: Store, patience: float = 0.0) -> "Manifest":
        """Read the manifest of a packed data set; `patience` is for how many seconds a store may not answer.

        Raises:
            UserError: there is none, it is not one, or it holds nothing to learn from.
            AttemptError: the store does not answer.
        """
        try:
            tree = json.loads(_patiently_read(store, patience))
        except FileNotFoundError:
            what = f"no {MANIFEST} in it" if store.exists() else "nothing there"
            raise UserError(
                f"no data set at {store.name} ({what}): check the URL, or make one with distrain pack"
            ) from None
        except OSError as error:
            kind = AttemptError if may_pass(error) else UserError
            raise kind(f"cannot read the data set at {store.name}: {error}") from None
        except ValueError:
            raise UserError(f"{store.name}/{MANIFEST} is not JSON: pack the data set again") from None
        try:
            if tree["format"] != _FORMAT:
                raise KeyError(_FORMAT)
            manifest = Manifest(
                shards=tuple(_shard(shard) for shard in tree["shards"]),
                classes=tuple(tree["classes"]),
                size=tree["size"] and (tree["size"][0], tree["size"][1]),
                encoding=tree["encoding"],
                proved=tree["proved"],
                statistics=Statistics(np.array(tree["mean"]), np.array(tree["covariance"])),
            )
        except (KeyError, TypeError):
            raise UserError(f"{store.name}/{MANIFEST} is not a {_FORMAT} manifest: pack the data set again") from None
        if manifest.rows == 0:
            raise UserError(f"the data set at {store.name} is empty: pack one with images in it")
        if len(manifest.classes) < 2:
            raise UserError(f"the data set at {store.name} has one class, so there is nothing to tell apart")
        return manifest


def _patiently_read(store: Store, patience: float) -> bytes:
    end = time.monotonic() + patience
    while True:
        try:
            return store.read(MANIFEST)
        except OSError as error:
            if not may_pass(error) or time.monotonic() > end:
                raise
        time.sleep(min(1.0, patience))


def _shard(tree: dict[str, Any]) -> Shard:
    return Shard(**{**tree, "groups": tuple(Group(**group) for group in tree["groups"])})
