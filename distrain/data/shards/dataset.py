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
    DamagedError,
    Footer,
    Piece,
    binary,
    parse_footer,
    read_group,
)
from distrain.data.storage.cache import DiskCache
from distrain.data.storage.store import Store
from distrain.errors import AttemptError

# As they lie in their files: parsed, they take thirteen times the memory, and parsing takes a tenth of a millisecond.
_FOOTER_BYTES = 16 << 20
_READ, _MORE = ["image.bytes", "label", "height", "width"], ["crc32c", "image.path"]
_READS_OF_DAMAGED = 4


class Row(NamedTuple):
    """One sample, for the loader."""

    data: NDArray[np.uint8]
    """The image file, a view on the row group's buffer where that is kept."""
    label: int
    size: tuple[int, int]
    """Height and width in pixels, as they were written."""


class Table(NamedTuple):
    """A row group in memory: row i's file is data[starts[i]:ends[i]]."""

    data: NDArray[np.uint8]
    starts: list[int]
    ends: list[int]
    labels: list[int]
    sizes: list[tuple[int, int]]
    crc32c: list[int]
    """Of each file, where asked for."""
    names: list[str]
    """Where each file came from, where asked for and known."""


def unpacked(
    manifest: Manifest,
    shard: Shard,
    number: int,
    data: bytes | memoryview,
    footer: Footer | None,
    *,
    whole: bool,
) -> Table:
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
    group = shard.groups[number]
    if (index := group.index) is not None:
        values, starts, ends = (
            np.frombuffer(data, np.uint8),
            index.start.tolist(),
            (index.start + index.size).tolist(),
        )
        if manifest.layout == "parquet":
            column = manifest.image_column
            table = read_group(
                [Piece(group.start, data)], shard.bytes, footer, group.number, [column]
            )
            values, offsets = binary(table.column(0))
            starts, ends = offsets[:-1], offsets[1:]
        sizes = list(zip(index.height.tolist(), index.width.tolist(), strict=True))
        return Table(
            values, starts, ends, index.label.tolist(), sizes, index.crc32c.tolist(), []
        )
    columns = _READ + _MORE if whole else _READ
    table = read_group([Piece(group.start, data)], shard.bytes, footer, number, columns)
    values, offsets = binary(table.column("image"))
    sizes = list(
        zip(
            table.column("height").to_pylist(),
            table.column("width").to_pylist(),
            strict=True,
        )
    )
    return Table(
        values,
        offsets[:-1],
        offsets[1:],
        table.column("label").to_pylist(),
        sizes,
        table.column("crc32c").to_pylist() if whole else [],
        table.column("image").combine_chunks().field("path").to_pylist()
        if whole
        else [],
    )


def store_of(manifest: Manifest, store: Store) -> Store:
    """Where the shards of a manifest lie that was found in a store."""
    return store if manifest.at in (None, store.url) else Store(manifest.at)


class Dataset:
    """Reads rows by sample id, keeping at most `memory` bytes of row groups. One thread reads rows at a time."""

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        *,
        memory: int,
        patience: float,
        cache: DiskCache | None = None,
    ) -> None:
        """Open a set.

        Args:
            store: where the manifest is, and the shards, unless it says another place.
            manifest: what they hold.
            memory: bytes of row groups that are kept, those on their way included.
            patience: seconds for which a read that fails is tried again.
            cache: keeps ranges on this machine's disk.
        """
        self.store, self.manifest = store_of(manifest, store), manifest
        self._memory, self._patience, self._cache = memory, patience, cache
        self._groups = manifest.groups
        rows = manifest.group_rows
        self._starts = np.cumsum(rows) - rows
        self._kept: OrderedDict[int, Future[Table]] = (
            OrderedDict()
        )  # fetched, or on their way
        self._kept_bytes = 0
        self._footers: OrderedDict[str, bytes] = OrderedDict()
        self._footer_bytes = 0
        self._lock = threading.Lock()  # footers and counts
        self.bad = manifest.bad
        """Verdicts so far: reason by sample id of files that do not decode. A memory, so that each costs once."""
        self.groups_read = 0
        """Row groups fetched so far, those fetched again included."""

    def groups_of(self, ids: NDArray[np.int64]) -> list[int]:
        """The row groups that hold samples, ascending."""
        groups: list[int] = np.unique(
            np.searchsorted(self._starts, ids, side="right") - 1
        ).tolist()
        return groups

    def prefetch(self, queued: Iterable[Sequence[int]], pool: Executor) -> None:
        """Start to fetch the row groups of micro-batches to come, in their order, as far as the memory has room.

        What an earlier one of them needs never goes for a later one.
        """
        earlier: set[int] = set()
        for groups in queued:
            earlier.update(groups)
            for g in groups:
                self._forget_cancelled(g)
                if g not in self._kept:
                    if not self._make_room(self._bytes(g), spared=earlier):
                        return
                    self._kept[g] = pool.submit(self._fetch, g)
                    self._kept_bytes += self._bytes(g)

    def rows(self, ids: NDArray[np.int64]) -> list[Row]:
        """The rows of sample ids, in their order.

        Raises:
            AttemptError: a row group cannot be read, or its checksum is wrong, however often; or a label is not one of
                the manifest's classes.
        """
        groups = np.searchsorted(self._starts, ids, side="right") - 1
        needed = np.unique(groups)
        size = sum(self._bytes(g) for g in needed)
        rows: list[Row | None] = [None] * len(ids)
        for g in needed:
            table = self._table(int(g))
            for place in np.flatnonzero(groups == g):
                i = int(ids[place] - self._starts[g])
                data = table.data[table.starts[i] : table.ends[i]]
                # A view keeps its whole group alive: copy where these groups do not fit the memory together.
                rows[place] = Row(
                    data.copy() if size > self._memory else data,
                    table.labels[i],
                    table.sizes[i],
                )
        return [row for row in rows if row is not None]

    def describe(self, sample_id: int) -> str:
        """Where a sample lies, for a person."""
        g = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        shard, number = self._groups[g]
        return f"{shard.path} row group {number} row {sample_id - self._starts[g]}"

    def _bytes(self, g: int) -> int:
        shard, number = self._groups[g]
        return shard.groups[number].end - shard.groups[number].start

    def _make_room(self, size: int, spared: Container[int] = ()) -> bool:
        """Let groups go that were wanted longest ago, but for those spared; whether `size` bytes fit then."""
        if size > self._memory:
            return False
        for old in list(self._kept):
            if self._kept_bytes + size <= self._memory:
                break
            if old not in spared:
                self._forget(old)
        return self._kept_bytes + size <= self._memory

    def _forget(self, g: int) -> None:
        self._kept.pop(g).cancel()
        self._kept_bytes -= self._bytes(g)

    def _forget_cancelled(self, g: int) -> None:
        """A loader that was closed early leaves what it had no time to fetch."""
        if g in self._kept and self._kept[g].cancelled():
            self._forget(g)

    def _table(self, g: int) -> Table:
        self._forget_cancelled(g)
        if g in self._kept:
            self._kept.move_to_end(g)
            try:
                return self._kept[g].result()
            except BaseException:  # whoever asks again tries again
                self._forget(g)
                raise
        fits, table = self._make_room(self._bytes(g)), self._fetch(g)
        if fits:
            self._kept[g] = Future()
            self._kept[g].set_result(table)
            self._kept_bytes += self._bytes(g)
        return table

    def _fetch(self, g: int) -> Table:
        shard, number = self._groups[g]
        group = shard.groups[number]
        footer = self._footer(shard) if shard.footer_start else None
        data = self._read(shard, group.start, group.end, group.crc32c)
        with self._lock:
            self.groups_read += 1
        try:
            table = unpacked(self.manifest, shard, number, data, footer, whole=False)
        except DamagedError as error:  # although its checksum is right
            raise AttemptError(
                f"{self._where(shard, number)} cannot be read: {error}"
            ) from None
        labels = np.array(table.labels)
        wrong = np.flatnonzero((labels < 0) | (labels >= len(self.manifest.classes)))
        if len(wrong):
            raise AttemptError(
                f"{self._where(shard, number)} row {wrong[0]} has label {labels[wrong[0]]}, "
                f"but the manifest names {len(self.manifest.classes)} classes: pack the data set again"
            )
        return table

    def _where(self, shard: Shard, number: int) -> str:
        return f"{self.store.name}/{shard.path} row group {number}"

    def _footer(self, shard: Shard) -> Footer:
        with self._lock:
            data = self._footers.get(shard.path)
        if data is None:
            data = bytes(
                self._read(shard, shard.footer_start, shard.bytes, shard.footer_crc32c)
            )
            with self._lock:
                if shard.path not in self._footers:
                    self._footers[shard.path] = data
                    self._footer_bytes += len(data)
                while self._footer_bytes > _FOOTER_BYTES:
                    self._footer_bytes -= len(self._footers.popitem(last=False)[1])
        return parse_footer(data)

    def _read(
        self, shard: Shard, start: int, end: int, checksum: int
    ) -> bytes | memoryview:
        """A verified range, from the disk cache where that has it."""
        if self._cache is None:
            return self._read_store(shard, start, end, checksum)
        key = DiskCache.key(self.manifest.fingerprint, shard.path, start, end, checksum)
        kept = self._cache.get(key, checksum)
        if kept is not None:
            return kept
        data = self._read_store(shard, start, end, checksum)
        self._cache.put(key, data)
        return data

    def _read_store(
        self, shard: Shard, start: int, end: int, checksum: int
    ) -> bytes | memoryview:
        """A verified range. A failure is never taken for a bad sample: it is tried again, then ends the attempt."""
        where, patient_until = (
            f"{self.store.name}/{shard.path}",
            time.monotonic() + self._patience,
        )
        for _ in range(_READS_OF_DAMAGED):
            try:
                data = self.store.view(
                    shard.path, start, end, patience=patient_until - time.monotonic()
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
                    self._replaced(shard)
                    or f"{where} cannot be read ({error}), tried for {self._patience:.0f} s: mend the storage, "
                    "then run the same command to go on"
                ) from error
            if len(data) == end - start and crc32c(data) == checksum:
                return data
        raise AttemptError(
            self._replaced(shard)
            or f"{where} is damaged: bytes {start} to {end} do not have the manifest's checksum, read "
            f"{_READS_OF_DAMAGED} times: restore the shard, or pack the data set again; then run the same command"
        )

    def _replaced(self, shard: Shard) -> str | None:
        """What to say if a shard has another size, or another ETag, than when its manifest was written."""
        where = f"{self.store.name}/{shard.path}"
        remedy = "it was replaced or cut; restore it, or pack the data set again"
        try:
            size = self.store.size(shard.path)
            version = None if shard.version is None else self.store.version(shard.path)
        except OSError:
            return None
        if size != shard.bytes:
            return f"{where} has {size} bytes, and {shard.bytes} when its manifest was written: {remedy}"
        if version is not None and version != shard.version:
            return f"{where} has ETag {version}, and {shard.version} when its manifest was written: {remedy}"
        return None
