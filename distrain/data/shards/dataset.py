"""Reads shards by sample id, one row group at a time.

The shards are those of `pack`, or Parquet and tar files that others wrote. The manifest
holds the byte range and CRC-32C of every row group, so one ranged read brings one
group, verified.
"""

import operator
import threading
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.data.shards.manifest import Manifest
from distrain.data.shards.parquet_pages import DamagedParquetError
from distrain.data.shards.reader import ShardReader
from distrain.data.shards.row_group import LoadedRowGroup, parse_row_group
from distrain.data.storage.cache import DiskCache
from distrain.data.storage.store import Store
from distrain.errors import AttemptError


class Row(NamedTuple):
    """One sample, for the loader."""

    data: NDArray[np.uint8]
    """The image file: a view of the row group's buffer, or a copy of its bytes."""
    label: int
    image_size: tuple[int, int]
    """Height and width in pixels, as recorded when it was packed or indexed: upright,
    unless that was before `Manifest.reading` 2. The file's EXIF may have to turn it."""


def open_shard_store(manifest: Manifest, store: Store) -> Store:
    """Return the store of a manifest's shards.

    Args:
        manifest: says whether the shards are elsewhere.
        store: where the manifest was read.
    """
    if manifest.shards_url in (None, store.url):
        return store
    return Store(manifest.shards_url)


class Dataset:
    """Rows by sample id, with at most `memory_bytes` of row groups cached in memory.

    `Dataset.open` opens a packed or indexed data set; `len(dataset)`, `dataset[i]` and
    iteration give its rows, each with the bytes of an image file, to be decoded for
    example by `PIL.Image.open(io.BytesIO(row.data))`.

    Only one thread may read rows. Below, `group` is the index of a row group in the
    whole data set, in the order of sample ids, and `group_index` the one in
    `shard.groups`, which may be below its number in the file.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        *,
        memory_bytes: int,
        retry_seconds: float,
        disk_cache: DiskCache | None = None,
    ) -> None:
        """Open a data set.

        Args:
            store: where the manifest is, and the shards unless it gives their URL.
            manifest: manifest of the data set.
            memory_bytes: limit of the cached row groups, counting those that are being
                fetched.
            retry_seconds: seconds for which a read that fails is retried.
            disk_cache: keeps ranges on this machine's disk.
        """
        self.store = open_shard_store(manifest, store)
        self.manifest = manifest
        self.classes = manifest.classes
        """Class names, by label."""
        # Number in `classes` of each label that is stored; None: the same number.
        self._class_numbers: NDArray[np.int64] | None = None
        self._memory_bytes = memory_bytes
        self._reader = ShardReader(self.store, manifest, retry_seconds, disk_cache)
        self._row_groups = manifest.row_groups

        # First sample id of each row group.
        rows_per_group = manifest.rows_per_group
        self._group_starts = np.cumsum(rows_per_group) - rows_per_group

        # Groups that are fetched or being fetched, the least recently used first.
        self._cached_groups: OrderedDict[int, Future[LoadedRowGroup]] = OrderedDict()
        self._cached_bytes = 0
        self.bad_samples = dict(manifest.bad_samples)
        """Reason by sample id of files found not to decode, so each is tried once."""
        # Guards `num_groups_read`, which the fetching threads increment.
        self._lock = threading.Lock()
        self.num_groups_read = 0
        """Row groups fetched so far, counting a group each time it is fetched."""

    @classmethod
    def open(
        cls,
        url: str | Path,
        *,
        memory_bytes: int = 256 << 20,
        retry_seconds: float = 60.0,
    ) -> "Dataset":
        """Open a packed or indexed data set.

        Args:
            url: path or URL of its manifest's folder.
            memory_bytes: limit of the cached row groups.
            retry_seconds: seconds for which a read that fails is retried.

        Raises:
            UserError: there is no data set, or its manifest is invalid.
            AttemptError: the store does not answer.
        """
        store = Store(str(url))
        return cls(
            store,
            Manifest.load(store, retry_seconds),
            memory_bytes=memory_bytes,
            retry_seconds=retry_seconds,
        )

    def renumber_classes(self, classes: Sequence[str], numbers: Sequence[int]) -> None:
        """Give labels the numbers that their classes have in another data set.

        To be called before the first read.

        Args:
            classes: class names of the other data set, by label.
            numbers: number in `classes` of each class of this one.
        """
        assert not self._cached_groups, "labels were read before"
        self.classes = tuple(classes)
        self._class_numbers = np.array(numbers)

    def __len__(self) -> int:
        """Return the number of samples, bad ones included."""
        return self.manifest.num_rows

    def __getitem__(self, sample_id: int) -> Row:
        """Return one sample: the bytes of its image file, label and image size.

        Negative ids count from the end. There are no slices.
        """
        try:
            positive_id = range(len(self))[operator.index(sample_id)]
        except IndexError:
            raise IndexError(f"sample {sample_id} of {len(self)}") from None
        (row,) = self.read_rows(np.array([positive_id]))
        # A view would keep its whole row group alive.
        return row._replace(data=row.data.copy())

    def find_row_groups(self, sample_ids: NDArray[np.int64]) -> list[int]:
        """Return the row groups that hold samples, ascending."""
        group_of_each = self._find_group_of_each(sample_ids)
        groups: list[int] = np.unique(group_of_each).tolist()
        return groups

    def prefetch_row_groups(
        self, upcoming_groups: Iterable[Sequence[int]], executor: Executor
    ) -> None:
        """Start to fetch the row groups of upcoming micro-batches, as far as they fit.

        A group that an earlier micro-batch needs is never evicted for a later one.

        Args:
            upcoming_groups: the groups of each micro-batch, in the order of use.
            executor: runs the fetches.
        """
        needed_groups: set[int] = set()
        for groups in upcoming_groups:
            needed_groups.update(groups)
            for group in groups:
                self._evict_if_cancelled(group)
                if group in self._cached_groups:
                    continue
                num_bytes = self._get_group_bytes(group)
                # Stop at the first that does not fit: those after it are needed later.
                if not self._evict_until_fits(num_bytes, spared=needed_groups):
                    return
                future = executor.submit(self._fetch_row_group, group)
                self._cached_groups[group] = future
                self._cached_bytes += num_bytes

    def read_rows(self, sample_ids: NDArray[np.int64]) -> list[Row]:
        """Return the rows of sample ids, in their order.

        Raises:
            AttemptError: a row group cannot be read, its checksum is wrong in every
                read, or a label is not one of the manifest's classes.
        """
        group_of_each = self._find_group_of_each(sample_ids)
        groups = np.unique(group_of_each)
        # A view keeps its whole group alive: copy if these groups together exceed the
        # memory limit.
        num_bytes = sum(self._get_group_bytes(group) for group in groups)
        must_copy = num_bytes > self._memory_bytes

        # Read group by group, and put each row where its sample id stands.
        rows: list[Row | None] = [None] * len(sample_ids)
        for group in groups:
            loaded = self._get_row_group(int(group))
            for position in np.flatnonzero(group_of_each == group):
                i = int(sample_ids[position] - self._group_starts[group])
                start = loaded.starts[i]
                end = loaded.ends[i]
                data = loaded.data[start:end]
                if must_copy:
                    data = data.copy()
                rows[position] = Row(data, loaded.labels[i], loaded.image_sizes[i])
        # Every position is filled; the condition is for mypy.
        return [row for row in rows if row is not None]

    def describe_sample(self, sample_id: int) -> str:
        """Return shard, row group and row of a sample, for messages."""
        next_group = np.searchsorted(self._group_starts, sample_id, side="right")
        group = int(next_group) - 1
        shard, group_index = self._row_groups[group]
        row = sample_id - self._group_starts[group]
        return f"{shard.describe_group(group_index)} row {row}"

    def _find_group_of_each(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._group_starts, sample_ids, side="right") - 1

    def _get_group_bytes(self, group: int) -> int:
        shard, group_index = self._row_groups[group]
        byte_range = shard.groups[group_index]
        return byte_range.end - byte_range.start

    def _evict_until_fits(self, num_bytes: int, spared: Container[int] = ()) -> bool:
        """Evict least recently used groups, except `spared`; return whether it fits."""
        # Evict nothing for a group that cannot fit at all.
        if num_bytes > self._memory_bytes:
            return False
        for group in list(self._cached_groups):
            if self._cached_bytes + num_bytes <= self._memory_bytes:
                break
            if group not in spared:
                self._evict_group(group)
        return self._cached_bytes + num_bytes <= self._memory_bytes

    def _evict_group(self, group: int) -> None:
        self._cached_groups.pop(group).cancel()
        self._cached_bytes -= self._get_group_bytes(group)

    def _evict_if_cancelled(self, group: int) -> None:
        # A loader that is closed early cancels the fetches that have not started.
        future = self._cached_groups.get(group)
        if future is not None and future.cancelled():
            self._evict_group(group)

    def _get_row_group(self, group: int) -> LoadedRowGroup:
        """Return a row group, from the cache or fetched on this thread."""
        self._evict_if_cancelled(group)
        if group in self._cached_groups:
            self._cached_groups.move_to_end(group)
            try:
                return self._cached_groups[group].result()
            except BaseException:
                # Evict the failed fetch, so that the next call starts another one.
                self._evict_group(group)
                raise
        # Evict before the fetch, so that memory stays within the limit.
        num_bytes = self._get_group_bytes(group)
        fits = self._evict_until_fits(num_bytes)
        loaded = self._fetch_row_group(group)
        if fits:
            future = Future[LoadedRowGroup]()
            future.set_result(loaded)
            self._cached_groups[group] = future
            self._cached_bytes += num_bytes
        return loaded

    def _fetch_row_group(self, group: int) -> LoadedRowGroup:
        """Read, parse and check a row group. Threads of the executor run this too."""
        # Read the verified bytes. Tar shards have no footer.
        shard, group_index = self._row_groups[group]
        byte_range = shard.groups[group_index]
        footer = self._reader.read_footer(shard) if shard.footer_start else None
        data = self._reader.read_range(
            shard, byte_range.start, byte_range.end, byte_range.crc32c
        )
        with self._lock:
            self.num_groups_read += 1

        # Parse them. The checksum is right, so an error here was made by the writer.
        group_name = f"{self.store.redacted_url}/{shard.describe_group(group_index)}"
        try:
            loaded = parse_row_group(
                self.manifest,
                shard,
                group_index,
                data,
                footer,
                include_metadata=False,
            )
        except DamagedParquetError as error:
            raise AttemptError(
                f"{group_name} cannot be read although its checksum is right "
                f"({error}): pack or index the data set again"
            ) from None

        # Check the labels: one out of range would only fail later, in the loss.
        labels = np.array(loaded.labels)
        num_classes = len(self.manifest.classes)
        is_wrong = (labels < 0) | (labels >= num_classes)
        wrong_rows = np.flatnonzero(is_wrong)
        if len(wrong_rows):
            row = wrong_rows[0]
            raise AttemptError(
                f"{group_name} row {row} has label {labels[row]}, but the manifest "
                f"names {num_classes} classes: pack or index it again"
            )
        if self._class_numbers is not None:
            loaded = loaded._replace(labels=self._class_numbers[labels].tolist())
        return loaded
