"""Reads shards, those of `pack` and those that others wrote, row group by row group, by sample id.

The manifest holds the byte range and CRC-32C of every row group, so one ranged read brings one group, verified.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import Executor, Future
from typing import NamedTuple

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from distrain.data.shards.manifest import Manifest, Shard
from distrain.data.shards.parquet import (
    ByteRange,
    DamagedParquetError,
    Footer,
    parse_footer,
    read_row_group,
    view_binary_column,
)
from distrain.data.storage.cache import DiskCache
from distrain.data.storage.store import Store
from distrain.errors import AttemptError

# As they lie in their files: parsed, they take thirteen times the memory, and parsing takes a tenth of a millisecond.
_FOOTER_CACHE_BYTES = 16 << 20
_ROW_COLUMNS, _EXTRA_COLUMNS = (
    ["image.bytes", "label", "height", "width"],
    ["crc32c", "image.path"],
)
_MAX_DAMAGED_READS = 4


class Row(NamedTuple):
    """One sample, for the loader."""

    data: NDArray[np.uint8]
    """The image file, a view on the row group's buffer where that is kept."""
    label: int
    image_size: tuple[int, int]
    """Height and width in pixels, as they were written."""


class LoadedRowGroup(NamedTuple):
    """A row group in memory: row i's file is data[starts[i]:ends[i]]."""

    data: NDArray[np.uint8]
    starts: list[int]
    ends: list[int]
    labels: list[int]
    image_sizes: list[tuple[int, int]]
    crc32c: list[int]
    """Of each file, where asked for."""
    names: list[str]
    """Where each file came from, where asked for and known."""


def parse_row_group(
    manifest: Manifest,
    shard: Shard,
    group_index: int,
    data: bytes | memoryview,
    footer: Footer | None,
    *,
    include_metadata: bool,
) -> LoadedRowGroup:
    """A row group from the bytes that the manifest says are its own.

    Args:
        manifest: of the set.
        shard: it is of this shard.
        number: its place in there.
        data: bytes `start` to `end` of the shard.
        footer: of the shard, where that is Parquet.
        whole: with checksums and names.

    Raises:
        DamagedError: they are no such group, although their checksum may be right.
    """
    group = shard.groups[group_index]
    if (index := group.index) is not None:
        values, starts, ends = (
            np.frombuffer(data, np.uint8),
            index.start.tolist(),
            (index.start + index.size).tolist(),
        )
        if manifest.layout == "parquet":
            column = manifest.image_column
            table = read_row_group(
                [ByteRange(group.start, data)],
                shard.bytes,
                footer,
                group.number,
                [column],
            )
            values, offsets = view_binary_column(table.column(0))
            starts, ends = offsets[:-1], offsets[1:]
        sizes = list(zip(index.height.tolist(), index.width.tolist(), strict=True))
        return LoadedRowGroup(
            values, starts, ends, index.label.tolist(), sizes, index.crc32c.tolist(), []
        )
    columns = _ROW_COLUMNS + _EXTRA_COLUMNS if include_metadata else _ROW_COLUMNS
    table = read_row_group(
        [ByteRange(group.start, data)], shard.bytes, footer, group_index, columns
    )
    values, offsets = view_binary_column(table.column("image"))
    sizes = list(
        zip(
            table.column("height").to_pylist(),
            table.column("width").to_pylist(),
            strict=True,
        )
    )
    return LoadedRowGroup(
        values,
        offsets[:-1],
        offsets[1:],
        table.column("label").to_pylist(),
        sizes,
        table.column("crc32c").to_pylist() if include_metadata else [],
        table.column("image").combine_chunks().field("path").to_pylist()
        if include_metadata
        else [],
    )


def open_shard_store(manifest: Manifest, store: Store) -> Store:
    """Where the shards of a manifest lie that was found in a store."""
    return (
        store
        if manifest.shards_url in (None, store.url)
        else Store(manifest.shards_url)
    )


class Dataset:
    """Reads rows by sample id, keeping at most `memory` bytes of row groups. One thread reads rows at a time."""

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        *,
        memory_bytes: int,
        retry_seconds: float,
        disk_cache: DiskCache | None = None,
    ) -> None:
        """Open a set.

        Args:
            store: where the manifest is, and the shards, unless it says another place.
            manifest: what they hold.
            memory: bytes of row groups that are kept, those on their way included.
            patience: seconds for which a read that fails is tried again.
            cache: keeps ranges on this machine's disk.
        """
        self.store, self.manifest = open_shard_store(manifest, store), manifest
        self._memory_bytes, self._retry_seconds, self._disk_cache = (
            memory_bytes,
            retry_seconds,
            disk_cache,
        )
        self._row_groups = manifest.row_groups
        rows = manifest.rows_per_group
        self._group_starts = np.cumsum(rows) - rows
        self._cached_groups: OrderedDict[int, Future[LoadedRowGroup]] = (
            OrderedDict()
        )  # fetched, or on their way
        self._cached_bytes = 0
        self._footer_cache: OrderedDict[str, bytes] = OrderedDict()
        self._footer_cache_bytes = 0
        self._lock = threading.Lock()  # footers and counts
        self.bad_samples = manifest.bad_samples
        """Verdicts so far: reason by sample id of files that do not decode. A memory, so that each costs once."""
        self.num_groups_read = 0
        """Row groups fetched so far, those fetched again included."""

    def find_row_groups(self, sample_ids: NDArray[np.int64]) -> list[int]:
        """The row groups that hold samples, ascending."""
        groups: list[int] = np.unique(
            np.searchsorted(self._group_starts, sample_ids, side="right") - 1
        ).tolist()
        return groups

    def prefetch_row_groups(
        self, upcoming_groups: Iterable[Sequence[int]], executor: Executor
    ) -> None:
        """Start to fetch the row groups of micro-batches to come, in their order, as far as the memory has room.

        What an earlier one of them needs never goes for a later one.
        """
        earlier: set[int] = set()
        for groups in upcoming_groups:
            earlier.update(groups)
            for g in groups:
                self._evict_if_cancelled(g)
                if g not in self._cached_groups:
                    if not self._evict_until_fits(
                        self._get_group_bytes(g), spared=earlier
                    ):
                        return
                    self._cached_groups[g] = executor.submit(self._fetch_row_group, g)
                    self._cached_bytes += self._get_group_bytes(g)

    def read_rows(self, sample_ids: NDArray[np.int64]) -> list[Row]:
        """The rows of sample ids, in their order.

        Raises:
            AttemptError: a row group cannot be read, or its checksum is wrong, however often; or a label is not one of
                the manifest's classes.
        """
        groups = np.searchsorted(self._group_starts, sample_ids, side="right") - 1
        needed = np.unique(groups)
        size = sum(self._get_group_bytes(g) for g in needed)
        rows: list[Row | None] = [None] * len(sample_ids)
        for g in needed:
            table = self._get_row_group(int(g))
            for place in np.flatnonzero(groups == g):
                i = int(sample_ids[place] - self._group_starts[g])
                data = table.data[table.starts[i] : table.ends[i]]
                # A view keeps its whole group alive: copy where these groups do not fit the memory together.
                rows[place] = Row(
                    data.copy() if size > self._memory_bytes else data,
                    table.labels[i],
                    table.image_sizes[i],
                )
        return [row for row in rows if row is not None]

    def describe_sample(self, sample_id: int) -> str:
        """Where a sample lies, for a person."""
        g = int(np.searchsorted(self._group_starts, sample_id, side="right")) - 1
        shard, number = self._row_groups[g]
        return (
            f"{shard.path} row group {number} row {sample_id - self._group_starts[g]}"
        )

    def _get_group_bytes(self, g: int) -> int:
        shard, number = self._row_groups[g]
        return shard.groups[number].end - shard.groups[number].start

    def _evict_until_fits(self, num_bytes: int, spared: Container[int] = ()) -> bool:
        """Let groups go that were wanted longest ago, but for those spared; whether `size` bytes fit then."""
        if num_bytes > self._memory_bytes:
            return False
        for old in list(self._cached_groups):
            if self._cached_bytes + num_bytes <= self._memory_bytes:
                break
            if old not in spared:
                self._evict_group(old)
        return self._cached_bytes + num_bytes <= self._memory_bytes

    def _evict_group(self, g: int) -> None:
        self._cached_groups.pop(g).cancel()
        self._cached_bytes -= self._get_group_bytes(g)

    def _evict_if_cancelled(self, g: int) -> None:
        """A loader that was closed early leaves what it had no time to fetch."""
        if g in self._cached_groups and self._cached_groups[g].cancelled():
            self._evict_group(g)

    def _get_row_group(self, g: int) -> LoadedRowGroup:
        self._evict_if_cancelled(g)
        if g in self._cached_groups:
            self._cached_groups.move_to_end(g)
            try:
                return self._cached_groups[g].result()
            except BaseException:  # whoever asks again tries again
                self._evict_group(g)
                raise
        fits, table = (
            self._evict_until_fits(self._get_group_bytes(g)),
            self._fetch_row_group(g),
        )
        if fits:
            self._cached_groups[g] = Future()
            self._cached_groups[g].set_result(table)
            self._cached_bytes += self._get_group_bytes(g)
        return table

    def _fetch_row_group(self, g: int) -> LoadedRowGroup:
        shard, number = self._row_groups[g]
        group = shard.groups[number]
        footer = self._get_footer(shard) if shard.footer_start else None
        data = self._read_range(shard, group.start, group.end, group.crc32c)
        with self._lock:
            self.num_groups_read += 1
        try:
            table = parse_row_group(
                self.manifest, shard, number, data, footer, include_metadata=False
            )
        except DamagedParquetError as error:  # although its checksum is right
            raise AttemptError(
                f"{self._describe_row_group(shard, number)} cannot be read: {error}"
            ) from None
        labels = np.array(table.labels)
        wrong = np.flatnonzero((labels < 0) | (labels >= len(self.manifest.classes)))
        if len(wrong):
            raise AttemptError(
                f"{self._describe_row_group(shard, number)} row {wrong[0]} has label {labels[wrong[0]]}, "
                f"but the manifest names {len(self.manifest.classes)} classes: pack the data set again"
            )
        return table

    def _describe_row_group(self, shard: Shard, number: int) -> str:
        return f"{self.store.redacted_url}/{shard.path} row group {number}"

    def _get_footer(self, shard: Shard) -> Footer:
        with self._lock:
            data = self._footer_cache.get(shard.path)
        if data is None:
            data = bytes(
                self._read_range(
                    shard, shard.footer_start, shard.bytes, shard.footer_crc32c
                )
            )
            with self._lock:
                if shard.path not in self._footer_cache:
                    self._footer_cache[shard.path] = data
                    self._footer_cache_bytes += len(data)
                while self._footer_cache_bytes > _FOOTER_CACHE_BYTES:
                    self._footer_cache_bytes -= len(
                        self._footer_cache.popitem(last=False)[1]
                    )
        return parse_footer(data)

    def _read_range(
        self, shard: Shard, start: int, end: int, checksum: int
    ) -> bytes | memoryview:
        """A verified range, from the disk cache where that has it."""
        if self._disk_cache is None:
            return self._read_from_store(shard, start, end, checksum)
        key = DiskCache.make_key(
            self.manifest.fingerprint, shard.path, start, end, checksum
        )
        kept = self._disk_cache.get_range(key, checksum)
        if kept is not None:
            return kept
        data = self._read_from_store(shard, start, end, checksum)
        self._disk_cache.put_range(key, data)
        return data

    def _read_from_store(
        self, shard: Shard, start: int, end: int, checksum: int
    ) -> bytes | memoryview:
        """A verified range. A failure is never taken for a bad sample: it is tried again, then ends the attempt."""
        where, patient_until = (
            f"{self.store.redacted_url}/{shard.path}",
            time.monotonic() + self._retry_seconds,
        )
        for _ in range(_MAX_DAMAGED_READS):
            try:
                data = self.store.read_view(
                    shard.path,
                    start,
                    end,
                    retry_seconds=patient_until - time.monotonic(),
                )
            except FileNotFoundError:
                raise AttemptError(
                    f"{where} is missing: restore it, or pack the data set again"
                ) from None
            except PermissionError as error:
                raise AttemptError(
                    f"{where} may not be read ({error}): check its permissions"
                ) from None
            except OSError as error:
                raise AttemptError(
                    self._explain_replacement(shard)
                    or f"{where} cannot be read ({error}), tried for {self._retry_seconds:.0f} s: mend the storage, "
                    "then run the same command to go on"
                ) from error
            if len(data) == end - start and crc32c(data) == checksum:
                return data
        raise AttemptError(
            self._explain_replacement(shard)
            or f"{where} is damaged: bytes {start} to {end} do not have the manifest's checksum, read "
            f"{_MAX_DAMAGED_READS} times: restore the shard, or pack the data set again; then run the same command"
        )

    def _explain_replacement(self, shard: Shard) -> str | None:
        """What to say if a shard has another size, or another ETag, than when its manifest was written."""
        where = f"{self.store.redacted_url}/{shard.path}"
        remedy = "it was replaced or cut; restore it, or pack the data set again"
        try:
            size = self.store.get_size(shard.path)
            version = None if shard.version is None else self.store.get_etag(shard.path)
        except OSError:
            return None
        if size != shard.bytes:
            return f"{where} has {size} bytes, and {shard.bytes} when its manifest was written: {remedy}"
        if version is not None and version != shard.version:
            return f"{where} has ETag {version}, and {shard.version} when its manifest was written: {remedy}"
        return None
