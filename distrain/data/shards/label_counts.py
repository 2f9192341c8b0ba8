"""Count the labels of a data set without reading its images."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from distrain.data.shards.entries import Shard
from distrain.data.shards.manifest import Manifest
from distrain.data.shards.parquet import (
    ByteRange,
    Footer,
    find_column_chunk,
    read_row_group,
)
from distrain.data.shards.parquet_pages import DamagedParquetError
from distrain.data.shards.reader import ShardReader
from distrain.data.storage.store import Store
from distrain.errors import AttemptError

# Reads in flight: each brings some hundred bytes, so that a bucket's latency counts.
_NUM_THREADS = 16
_LABEL_COLUMN = "label"


def count_labels(store: Store, manifest: Manifest, retry_seconds: float) -> list[int]:
    """Count the samples of each class of a data set, bad ones included.

    The labels of a packed set are read from its shards. A checksum is that of a whole
    row group: damage that only changes labels is found when the group is read.

    Args:
        store: where the shards are.
        manifest: manifest of the data set.
        retry_seconds: seconds for which a read that fails is retried.

    Raises:
        AttemptError: labels cannot be read, or are not those of the manifest's classes.
    """
    reader = ShardReader(store, manifest, retry_seconds, None)
    num_classes = len(manifest.classes)

    def count_shard(shard: Shard) -> NDArray[np.int64]:
        counts = np.zeros(num_classes, np.int64)
        footer: Footer = None
        for i, group in enumerate(shard.groups):
            if group.index is not None:
                labels = group.index.label.astype(np.int64)
            else:
                # The footer is read once per shard, and not at all of an indexed set.
                footer = footer or reader.read_footer(shard)
                labels = _read_labels(store, shard, i, footer, retry_seconds)
            is_wrong = (labels < 0) | (labels >= num_classes)
            if len(labels) != group.rows or is_wrong.any():
                raise AttemptError(
                    f"{store.redacted_url}/{shard.describe_group(i)} does not have the "
                    "labels that the manifest describes: pack or index the data set "
                    "again"
                )
            counts += np.bincount(labels, minlength=num_classes)
        return counts

    with ThreadPoolExecutor(_NUM_THREADS, "distrain-labels") as executor:
        counts_by_shard = executor.map(count_shard, manifest.shards)
        total = sum(counts_by_shard, np.zeros(num_classes, np.int64))
    counts: list[int] = total.tolist()
    return counts


def _read_labels(
    store: Store, shard: Shard, group_index: int, footer: Footer, retry_seconds: float
) -> NDArray[np.int64]:
    """Read the labels of a row group that `pack` wrote. Raises AttemptError."""
    place = f"{store.redacted_url}/{shard.describe_group(group_index)}"
    start, end = find_column_chunk(footer, group_index, _LABEL_COLUMN)
    try:
        data = store.read_view(shard.path, start, end, retry_seconds=retry_seconds)
        table = read_row_group(
            [ByteRange(start, data)], shard.bytes, footer, group_index, [_LABEL_COLUMN]
        )
    except (OSError, DamagedParquetError) as error:
        raise AttemptError(
            f"the labels of {place} cannot be read ({error}): fix the storage, or pack "
            "the data set again"
        ) from None
    labels = table.column(0).to_numpy()
    return np.asarray(labels, np.int64)
