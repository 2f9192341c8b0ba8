"""Reads shards (`writer` says what they are) row group by row group, by sample id.

The manifest holds the byte range and CRC-32C of every row group, so one ranged read brings one group, verified.
"""

import random
import threading
import time
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import Executor, Future
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c
from numpy.typing import NDArray

from distrain.data.cache import DiskCache
from distrain.data.manifest import Manifest, Shard
from distrain.data.store import Store
from distrain.errors import AttemptError

_OPEN_FOOTERS = 64
_READ = ["image.bytes", "label", "height", "width"]
_READS_OF_DAMAGED = 4


class StoredRow(NamedTuple):
    """All that a shard says of a sample."""

    data: bytes
    label: int
    size: tuple[int, int]
    """Height and width in pixels."""
    crc32c: int
    path: str
    """Where it came from."""


def stored_rows(shard: bytes, number: int) -> list[StoredRow]:
    """The rows of a row group of a whole shard."""
    table = pq.ParquetFile(pa.BufferReader(shard)).read_row_group(number, use_threads=False).to_pylist()
    return [
        StoredRow(
            row["image"]["bytes"], row["label"], (row["height"], row["width"]), row["crc32c"], row["image"]["path"]
        )
        for row in table
    ]


class Row(NamedTuple):
    """One sample, for the loader."""

    data: NDArray[np.uint8]
    """The image file, a view on the row group's buffer where that is kept."""
    label: int
    size: tuple[int, int]
    """Height and width in pixels, as they were written."""


class _Table(NamedTuple):
    """A row group in memory: row i's file is data[offsets[i]:offsets[i + 1]]."""

    data: NDArray[np.uint8]
    offsets: list[int]
    labels: list[int]
    sizes: list[tuple[int, int]]


class Dataset:
    """Reads rows by sample id, keeping at most `memory` bytes of row groups. One thread reads rows at a time."""

    def __init__(
        self, store: Store, manifest: Manifest, *, memory: int, patience: float, cache: DiskCache | None = None
    ) -> None:
        """Open a set.

        Args:
            store: where the shards are.
            manifest: what they hold.
            memory: bytes of row groups that are kept, those on their way included.
            patience: seconds for which a read that fails is tried again.
            cache: keeps ranges on this machine's disk.
        """
        self.store, self.manifest = store, manifest
        self._memory, self._patience, self._cache = memory, patience, cache
        self._groups = manifest.groups
        rows = manifest.group_rows
        self._starts = np.cumsum(rows) - rows
        self._kept: OrderedDict[int, Future[_Table]] = OrderedDict()  # fetched, or on their way
        self._kept_bytes = 0
        self._footers: OrderedDict[str, pq.FileMetaData] = OrderedDict()
        self._lock = threading.Lock()  # footers and counts
        self._jitter = random.Random()  # noqa: S311 - nothing in a step draws from the global one
        self.bad: dict[int, str] = {}
        """Verdicts so far: reason by sample id of files that do not decode. A memory, so that each costs once."""
        self.groups_read = 0
        """Row groups fetched so far, those fetched again included."""

    def groups_of(self, ids: NDArray[np.int64]) -> list[int]:
        """The row groups that hold samples, ascending."""
        groups: list[int] = np.unique(np.searchsorted(self._starts, ids, side="right") - 1).tolist()
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
                data = table.data[table.offsets[i] : table.offsets[i + 1]]
                # A view keeps its whole group alive: copy where these groups do not fit the memory together.
                rows[place] = Row(data.copy() if size > self._memory else data, table.labels[i], table.sizes[i])
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

    def _table(self, g: int) -> _Table:
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

    def _fetch(self, g: int) -> _Table:
        shard, number = self._groups[g]
        group = shard.groups[number]
        footer = self._footer(shard)
        data = self._read(shard, group.start, group.end, group.crc32c)
        with self._lock:
            self.groups_read += 1
        file = pq.ParquetFile(pa.PythonFile(_Window(data, group.start, shard.bytes), "r"), metadata=footer)
        table = file.read_row_group(number, columns=_READ, use_threads=False)
        labels = table.column("label").to_numpy()
        wrong = np.flatnonzero((labels < 0) | (labels >= len(self.manifest.classes)))
        if len(wrong):
            raise AttemptError(
                f"{self.store.name}/{shard.path} row group {number} row {wrong[0]} has label {labels[wrong[0]]}, "
                f"but the manifest names {len(self.manifest.classes)} classes: pack the data set again"
            )
        column = table.column("image").combine_chunks().field("bytes")
        _, offsets, values = column.buffers()
        first = column.offset
        return _Table(
            np.frombuffer(values, np.uint8) if values else np.empty(0, np.uint8),
            np.frombuffer(offsets, np.int32)[first : first + len(column) + 1].tolist(),
            labels.tolist(),
            list(zip(table.column("height").to_pylist(), table.column("width").to_pylist(), strict=True)),
        )

    def _footer(self, shard: Shard) -> pq.FileMetaData:
        with self._lock:
            if shard.path in self._footers:
                return self._footers[shard.path]
        data = self._read(shard, shard.footer_start, shard.bytes, shard.footer_crc32c)
        # A footer is read from the end of a file, and what stands before it is not looked at.
        footer = pq.read_metadata(pa.BufferReader(data))
        with self._lock:
            if len(self._footers) == _OPEN_FOOTERS:
                self._footers.popitem(last=False)
            self._footers[shard.path] = footer
        return footer

    def _read(self, shard: Shard, start: int, end: int, checksum: int) -> bytes:
        """A verified range, from the disk cache where that has it."""
        if self._cache is None:
            return self._read_store(shard, start, end, checksum)
        key = DiskCache.key(self.manifest.fingerprint, shard.path, start, end, checksum)
        data = self._cache.get(key, checksum)
        if data is None:
            data = self._read_store(shard, start, end, checksum)
            self._cache.put(key, data)
        return data

    def _read_store(self, shard: Shard, start: int, end: int, checksum: int) -> bytes:
        """A verified range. A failure is never taken for a bad sample: it is tried again, then ends the attempt."""
        where = f"{self.store.name}/{shard.path}"
        patient_until, pause, damaged = time.monotonic() + self._patience, 0.1, 0
        while True:
            try:
                data = self.store.read(shard.path, start, end)
            except FileNotFoundError:
                raise AttemptError(f"{where} is missing: restore it, or pack the data set again") from None
            except PermissionError as error:
                raise AttemptError(f"{where} may not be read ({error}): check its permissions") from None
            except OSError as error:
                if time.monotonic() + pause > patient_until:
                    raise AttemptError(
                        self._replaced(shard)
                        or f"{where} cannot be read ({error}), tried for {self._patience:.0f} s: mend the storage, "
                        "then run the same command to go on"
                    ) from error
            else:
                if len(data) == end - start and crc32c(data) == checksum:
                    return data
                damaged += 1
                if damaged == _READS_OF_DAMAGED:
                    raise AttemptError(
                        self._replaced(shard)
                        or f"{where} is damaged: bytes {start} to {end} do not have the manifest's checksum, read "
                        f"{damaged} times: restore the shard, or pack the data set again; then run the same command"
                    )
            with self._lock:
                self.store.counts.retries += 1
            # Jitter keeps the ranks from asking a store that is in trouble all at once.
            time.sleep(pause * self._jitter.uniform(0.5, 1.5))
            pause = min(2 * pause, 5.0)

    def _replaced(self, shard: Shard) -> str | None:
        """What to say if a shard has another size than when its manifest was written."""
        try:
            size = self.store.size(shard.path)
        except OSError:
            return None
        if size == shard.bytes:
            return None
        return (
            f"{self.store.name}/{shard.path} has {size} bytes, and {shard.bytes} when its manifest was written: "
            "it was replaced or cut; restore it, or pack the data set again"
        )


class _Window:
    """A file of `size` bytes of which only those from `start` on are there; pyarrow reads it without a copy."""

    closed = False

    def __init__(self, data: bytes, start: int, size: int) -> None:
        self._data, self._start, self._size, self._at = memoryview(data), start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        return self._size

    def read(self, n: int) -> memoryview:
        first = self._at - self._start
        assert 0 <= first <= len(self._data), "read outside the window"
        self._at += n
        return self._data[first : first + n]

    def close(self) -> None:
        self.closed = True

    def flush(self) -> None:
        pass
