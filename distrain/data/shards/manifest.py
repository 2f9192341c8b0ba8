"""Manifest of a data set: shards, row groups with checksums, classes and colors."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.data.shards.entries import (
    RowGroup,
    Shard,
    shard_from_dict,
    shard_to_dict,
)
from distrain.data.shards.stats import ColorStatistics
from distrain.data.storage.retry import is_transient
from distrain.data.storage.store import Store
from distrain.errors import AttemptError, UserError

MANIFEST_FILE = "manifest.json"
_FORMAT_NAME = "distrain-shards"
_FORMAT_NUMBER = 3
_FORMAT = f"{_FORMAT_NAME}-{_FORMAT_NUMBER}"
# It has no field `reading`: its files are read as they were then.
_FIRST_READING_FORMAT = f"{_FORMAT_NAME}-2"
FIRST_READING = 1
"""How image files were read by the versions whose manifests do not say it."""
READING = 2
"""How image files are read today; `decoding/image.py` says what has changed."""
_REMEDY = "restore it, or delete it and run distrain index (or pack again)"

Layout = Literal["distrain", "parquet", "tar"]


class PixelHash(NamedTuple):
    """What the hashes of pixels in a manifest are."""

    definition: str
    """Name of the hash, and of what is hashed."""
    decoder: str
    """Versions of the codecs that decoded the images: others may give other pixels."""


_STATISTICS_KEYS = ("mean", "covariance", "eigenvalues", "eigenvectors")


@dataclass(frozen=True, eq=False)
class Manifest:
    """Description of a data set."""

    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    """Class names, by label."""
    image_size: tuple[int, int] | None
    """Height and width of every image in pixels; None if they differ."""
    encoding: Literal["jpeg", "raw"]
    """jpeg: image files, mostly JPEG; raw: binary PPM files of one size, whose pixels
    are stored as they are."""
    verified: bool
    """True if every file was decoded whole when it was packed or indexed; if false,
    training must decode whole files to validate them."""
    statistics: ColorStatistics
    layout: Layout = "distrain"
    """distrain: shards of `pack`; parquet and tar: files of others, read in place."""
    image_column: str = "image.bytes"
    """Column of the images in Parquet files."""
    shards_url: str | None = None
    """URL of the shards; None if they are beside the manifest."""
    reading: int = READING
    """Version of how the image files are read. A change of it is a change of pixels."""
    pixel_hash: PixelHash | None = None
    """Hash by which equal images are found; None: the row groups have no hashes."""

    @property
    def may_crash_decoder(self) -> bool:
        """True if DALI may crash on a file.

        The files were never decoded, or `index` decoded them with PIL only.
        """
        if self.encoding == "raw":
            return False
        return not self.verified or self.layout != "distrain"

    @property
    def row_groups(self) -> list[tuple[Shard, int]]:
        """Every row group as (shard, index in it), in the order of sample ids."""
        row_groups = list[tuple[Shard, int]]()
        for shard in self.shards:
            row_groups.extend((shard, i) for i in range(len(shard.groups)))
        return row_groups

    @property
    def rows_per_group(self) -> NDArray[np.int64]:
        """Number of rows of each row group, in the order of sample ids."""
        rows = [group.rows for group in self._list_groups()]
        return np.array(rows, np.int64)

    @property
    def num_rows(self) -> int:
        """Number of samples in the data set."""
        return sum(group.rows for group in self._list_groups())

    @property
    def bad_samples(self) -> dict[int, str]:
        """Reason by sample id of images that `distrain index` found not to decode."""
        bad_samples = dict[int, str]()
        first_id = 0
        for group in self._list_groups():
            if group.index is not None:
                for row, reason in group.index.bad.items():
                    bad_samples[first_id + row] = reason
            # A bad row keeps its sample id, so all rows count.
            first_id += group.rows
        return bad_samples

    @property
    def pixel_hashes(self) -> NDArray[np.uint64] | None:
        """Hash of each row's pixels, shape (rows, 2), zeros for a bad row.

        None if there are no hashes.
        """
        if self.pixel_hash is None:
            return None
        data = b"".join(group.pixel_hashes or b"" for group in self._list_groups())
        return np.frombuffer(data, "<u8").reshape(self.num_rows, 2)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content; the location of the data set does not matter.

        Nor do the hashes of pixels, which training does not use.
        """
        tree = {**self._to_dict(include_hashes=False), "at": None}
        text = json.dumps(tree)
        return hashlib.sha256(text.encode()).hexdigest()

    def _list_groups(self) -> list[RowGroup]:
        groups = list[RowGroup]()
        for shard in self.shards:
            groups.extend(shard.groups)
        return groups

    def to_json(self) -> str:
        """Return the manifest as it is stored."""
        return json.dumps(self._to_dict(), indent=1)

    def _to_dict(self, *, include_hashes: bool = True) -> dict[str, Any]:
        # The fingerprint is a hash of this: another order of keys would change it.
        statistics = self.statistics
        is_first_reading = self.reading == FIRST_READING
        tree = {
            "format": _FIRST_READING_FORMAT if is_first_reading else _FORMAT,
            "layout": self.layout,
            "at": self.shards_url,
            "rows": self.num_rows,
            "classes": self.classes,
            "size": self.image_size,
            "encoding": self.encoding,
            "proved": self.verified,
            "image_column": self.image_column,
            "mean": statistics.mean.tolist(),
            "std": statistics.std.tolist(),
            "covariance": statistics.covariance.tolist(),
            "eigenvalues": statistics.eigenvalues.tolist(),
            "eigenvectors": statistics.eigenvectors.tolist(),
            "shards": [
                shard_to_dict(shard, include_hashes=include_hashes)
                for shard in self.shards
            ],
        }
        # Fields that the format before did not have come last, and only if they are
        # set, so that the fingerprints of its manifests stay as they were.
        if not is_first_reading:
            tree["reading"] = self.reading
        if include_hashes and self.pixel_hash is not None:
            tree["pixel_hash"] = self.pixel_hash._asdict()
        return tree

    @staticmethod
    def load(store: Store, retry_seconds: float = 0.0) -> "Manifest":
        """Read the manifest of a data set.

        Args:
            store: the data set.
            retry_seconds: seconds for which a store that does not answer is retried.

        Raises:
            UserError: the manifest is missing or invalid, or the data set has no
                images or fewer than two classes.
            AttemptError: the store does not answer.
        """
        tree = _read_manifest_file(store, retry_seconds)
        manifest = _manifest_from_dict(tree, f"{store.redacted_url}/{MANIFEST_FILE}")
        if manifest.num_rows == 0:
            raise UserError(
                f"the data set at {store.redacted_url} is empty: "
                "pack one with images in it"
            )
        if len(manifest.classes) < 2:
            raise UserError(
                f"the data set at {store.redacted_url} has fewer than two classes, "
                "so there is nothing to classify: pack one with at least two"
            )
        return manifest


def _read_manifest_file(store: Store, retry_seconds: float) -> Any:
    """Read the manifest of a data set as JSON. Raises UserError and AttemptError."""
    try:
        return json.loads(store.read(MANIFEST_FILE, retry_seconds=retry_seconds))
    except FileNotFoundError:
        raise UserError(
            f"no data set at {store.redacted_url} ({_explain_absence(store)}): "
            "check the URL, or make one with distrain pack or index"
        ) from None
    except NotADirectoryError:
        folder = store.redacted_url.rpartition("/")[0] or "."
        raise UserError(
            f"{store.redacted_url} is a file: name its folder, {folder}"
        ) from None
    except OSError as error:
        # Another attempt may succeed after a transient error, but not after another.
        error_class = AttemptError if is_transient(error) else UserError
        raise error_class(
            f"cannot read the data set at {store.redacted_url}: {error}"
        ) from None
    except ValueError:
        raise UserError(
            f"{store.redacted_url}/{MANIFEST_FILE} is damaged (not JSON): {_REMEDY}"
        ) from None


def _explain_absence(store: Store) -> str:
    """Return why there is no manifest."""
    try:
        exists = store.exists()
    except OSError as error:
        return str(error)
    return f"it has no {MANIFEST_FILE}" if exists else "it does not exist"


def _manifest_from_dict(tree: Any, manifest_url: str) -> Manifest:
    """Return the manifest from the dict that was read as JSON. Raises UserError."""
    invalid = UserError(f"{manifest_url} is not a {_FORMAT} manifest: {_REMEDY}")
    if not isinstance(tree, dict):
        raise invalid
    if _is_newer(tree):
        raise UserError(
            f"{manifest_url} was written by a newer version of distrain: install that "
            "version here too, or pack or index the data set again with this one"
        )
    if tree.get("format") not in (_FIRST_READING_FORMAT, _FORMAT):
        raise invalid
    # Checked apart from the other keys, for a message that says what needs them.
    if not tree.keys() >= set(_STATISTICS_KEYS):
        raise UserError(
            f"{manifest_url} has no color statistics, which normalization and "
            f"PCA color augmentation need: {_REMEDY} "
            "(distrain stats prints the statistics of a data set)"
        )
    try:
        size = tree["size"]
        statistics = (np.array(tree[name]) for name in _STATISTICS_KEYS)
        shards = tuple(shard_from_dict(shard) for shard in tree["shards"])
        return Manifest(
            shards=shards,
            classes=tuple(tree["classes"]),
            image_size=size and (size[0], size[1]),
            encoding=tree["encoding"],
            verified=tree["proved"],
            statistics=ColorStatistics(*statistics),
            layout=tree["layout"],
            image_column=tree["image_column"],
            shards_url=tree["at"],
            reading=_read_reading(tree),
            pixel_hash=_read_pixel_hash(tree, shards),
        )
    except (KeyError, TypeError, ValueError):
        raise invalid from None


def _is_newer(tree: Mapping[str, Any]) -> bool:
    """Return whether a manifest has a format or a reading of a version after this."""
    prefix, _, number = str(tree.get("format")).rpartition("-")
    if prefix == _FORMAT_NAME and number.isdecimal() and int(number) > _FORMAT_NUMBER:
        return True
    reading = tree.get("reading")
    return isinstance(reading, int) and reading > READING


def _read_pixel_hash(
    tree: Mapping[str, Any], shards: Sequence[Shard]
) -> PixelHash | None:
    """Return what the hashes of pixels are. Raises TypeError, ValueError."""
    if "pixel_hash" not in tree:
        return None
    pixel_hash = PixelHash(**tree["pixel_hash"])
    groups = [group for shard in shards for group in shard.groups]
    if any(group.pixel_hashes is None for group in groups):
        raise ValueError(pixel_hash)
    return pixel_hash


def _read_reading(tree: Mapping[str, Any]) -> int:
    """Return the reading that a manifest was made with. Raises KeyError, ValueError."""
    if tree["format"] == _FIRST_READING_FORMAT:
        return FIRST_READING
    reading = tree["reading"]
    # The first reading has a format of its own.
    if not isinstance(reading, int) or reading <= FIRST_READING:
        raise ValueError(reading)
    return reading
