"""Names and classes of single samples of a data set, read without their images."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.data.prepare.source import RETRY_SECONDS
from distrain.data.shards.entries import Shard
from distrain.data.shards.manifest import Manifest
from distrain.data.shards.parquet import ByteRange, find_column_chunk, read_row_group
from distrain.data.shards.parquet_pages import DamagedParquetError
from distrain.data.shards.reader import ShardReader
from distrain.data.storage.store import Store
from distrain.errors import AttemptError

_COLUMNS = ["label", "image.path"]
_NUM_THREADS = 8


class NamedSample(NamedTuple):
    """What a report says of a sample."""

    name: str
    """Its file in the source of a pack; of others' files, shard and row."""
    class_name: str | None
    """None: not known, since its shard cannot be read."""


def name_samples(
    store: Store, manifest: Manifest, sample_ids: NDArray[np.int64]
) -> tuple[list[NamedSample], list[str]]:
    """Return names and classes of samples, and a sentence per shard that is not read.

    Args:
        store: where the shards are.
        manifest: manifest of the data set.
        sample_ids: the samples.
    """
    # Find the row group of each sample.
    rows_per_group = manifest.rows_per_group
    group_starts = np.cumsum(rows_per_group) - rows_per_group
    group_of_each = np.searchsorted(group_starts, sample_ids, side="right") - 1
    rows = sample_ids - group_starts[group_of_each]

    # Read labels and names of these row groups.
    reader = _GroupReader(store, manifest)
    groups = np.unique(group_of_each).tolist()
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        samples_per_group = dict(
            zip(groups, pool.map(reader.read_group, groups), strict=True)
        )
    samples = [
        samples_per_group[group][row]
        for group, row in zip(group_of_each.tolist(), rows.tolist(), strict=True)
    ]
    return samples, list(reader.notes.values())


class _GroupReader:
    """Reads names and classes of row groups. Several threads may use it."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._store = store
        self._classes = manifest.classes
        self._row_groups = manifest.row_groups
        self._reader = ShardReader(store, manifest, RETRY_SECONDS, None)
        self.notes: dict[str, str] = {}
        """A sentence by shard that cannot be read."""

    def read_group(self, group: int) -> list[NamedSample]:
        """Return name and class of each row."""
        shard, group_index = self._row_groups[group]
        num_rows = shard.groups[group_index].rows
        location = shard.describe_group(group_index)
        places = [f"{location} row {row}" for row in range(num_rows)]
        index = shard.groups[group_index].index
        if index is not None:
            labels = index.label.tolist()
            return self._name_rows(places, labels)

        # One shard that does not answer takes a minute, however many groups it has.
        unknown = [NamedSample(place, None) for place in places]
        if shard.path in self.notes:
            return unknown
        try:
            labels, names = self._read_columns(shard, group_index)
        except (AttemptError, DamagedParquetError, OSError) as error:
            self.notes[shard.path] = (
                f"labels and names in {self._store.redacted_url}/{shard.path} cannot "
                f"be read, so classes of its images were not compared: {error}"
            )
            return unknown
        if len(labels) != num_rows:
            return unknown
        return self._name_rows(names, labels)

    def _name_rows(self, names: list[str], labels: list[int]) -> list[NamedSample]:
        classes = self._classes
        return [
            # A damaged shard may have any label.
            NamedSample(name, classes[label] if 0 <= label < len(classes) else None)
            for name, label in zip(names, labels, strict=True)
        ]

    def _read_columns(
        self, shard: Shard, group_index: int
    ) -> tuple[list[int], list[str]]:
        """Return labels and names of a row group that `pack` wrote.

        Raises:
            AttemptError: the shard's footer cannot be read.
            DamagedParquetError: the columns are damaged.
            OSError: the columns cannot be read.
        """
        # The columns lie beside each other, after that of the images.
        footer = self._reader.read_footer(shard)
        chunks = [find_column_chunk(footer, group_index, name) for name in _COLUMNS]
        start = min(chunk[0] for chunk in chunks)
        end = max(chunk[1] for chunk in chunks)
        data = self._store.read(shard.path, start, end, retry_seconds=RETRY_SECONDS)
        table = read_row_group(
            [ByteRange(start, data)], shard.bytes, footer, group_index, _COLUMNS
        )
        images = table.column("image").combine_chunks()
        return table.column("label").to_pylist(), images.field("path").to_pylist()
