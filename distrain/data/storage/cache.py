"""Bounded cache of byte ranges on this machine's disk.

All processes that use the same folder share it. Each entry is one file: it is written
under another name and then renamed, so that it is complete or absent, and its checksum
is verified at every read. The least recently used entries are evicted first. A process
that is still reading an evicted entry can finish: an open file outlives its name.
A folder that is full, damaged or deleted costs reads from the store, never a run.
"""

import fcntl
import hashlib
import os
import threading
from contextlib import suppress
from pathlib import Path

from crc32c import crc32c

from distrain.data.storage.store import StorageCounters

_RANGE_SUFFIX = ".range"
_PARTIAL_SUFFIX = ".partial"
_LOCK_FILE = "lock"
# A process checks the folder's size each time it has added this fraction of the limit.
_CHECKS_PER_LIMIT = 64


class DiskCache:
    """Byte ranges by key. Disk errors are counted, never raised."""

    def __init__(
        self, folder: str, limit_bytes: int, counters: StorageCounters
    ) -> None:
        """Open the folder, and remove partial files that killed processes left there.

        Args:
            folder: where the entries are; it need not exist.
            limit_bytes: maximum size of all entries together.
            counters: where hits, evictions and errors are counted.
        """
        self._folder = Path(folder)
        self._limit_bytes = limit_bytes
        self._counters = counters
        self._lock = threading.Lock()
        # Starts at the limit, so that the first put checks the folder's size.
        self._unchecked_bytes = limit_bytes
        self._remove_abandoned_files()

    @staticmethod
    def make_key(*parts: object) -> str:
        """Return the key of a byte range.

        Args:
            parts: what identifies the range: the version of the data set, the file and
                the offsets.
        """
        text = "\n".join(map(str, parts))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def get_range(self, key: str, checksum: int) -> bytes | None:
        """Return a range, or None if it is not cached.

        A range whose CRC-32C is not `checksum` is damaged: it is removed and counted.
        """
        path = self._folder / f"{key}{_RANGE_SUFFIX}"
        try:
            data = path.read_bytes()
            if crc32c(data) != checksum:
                path.unlink(missing_ok=True)
                self._count_error("damaged cache entry")
                return None
            # The modification time is the time of last use: eviction sorts by it.
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._count_error(f"cache: {error.strerror or type(error).__name__}")
            return None
        with self._lock:
            self._counters.cache_hits += 1
        return data

    def put_range(self, key: str, data: bytes | memoryview) -> None:
        """Cache a range, if the disk has room for it."""
        if len(data) > self._limit_bytes:
            return
        writer_id = f"{os.getpid()}.{threading.get_ident()}"
        partial = self._folder / f"{key}.{writer_id}{_PARTIAL_SUFFIX}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Scanning the folder takes long, so evict only after many bytes were added,
            # and then enough for the bytes that will be added without a check.
            unchecked_limit = self._limit_bytes // _CHECKS_PER_LIMIT
            if self._is_check_due(len(data), unchecked_limit):
                self._evict_ranges(len(data) + unchecked_limit)
            with partial.open("xb") as file:
                # Locked while it is written: a process that starts meanwhile removes
                # the partial files that are not.
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(data)
                file.flush()
                os.replace(partial, self._folder / f"{key}{_RANGE_SUFFIX}")
        except OSError as error:
            self._count_error(f"cache: {error.strerror or type(error).__name__}")
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _remove_abandoned_files(self) -> None:
        with suppress(OSError):
            for partial in self._folder.glob(f"*{_PARTIAL_SUFFIX}"):
                with partial.open("rb") as file, suppress(OSError):
                    # Fails while the writer is alive, since that holds the lock.
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    partial.unlink(missing_ok=True)

    def _is_check_due(self, added_bytes: int, unchecked_limit: int) -> bool:
        with self._lock:
            self._unchecked_bytes += added_bytes
            is_due = self._unchecked_bytes > unchecked_limit
            if is_due:
                self._unchecked_bytes = 0
        return is_due

    def _evict_ranges(self, needed_bytes: int) -> None:
        """Evict least recently used entries until `needed_bytes` more fit."""
        # One process at a time: two that scan together would evict, and count, the same
        # entries.
        with (self._folder / _LOCK_FILE).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = []
            for entry in os.scandir(self._folder):
                if not entry.name.endswith(_RANGE_SUFFIX):
                    continue
                # Another process may remove a damaged entry during the scan.
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    entries.append((status.st_mtime_ns, status.st_size, entry.path))
            used_bytes = sum(size for _, size, _ in entries)
            for _, size, path in sorted(entries):
                if used_bytes + needed_bytes <= self._limit_bytes:
                    return
                Path(path).unlink(missing_ok=True)
                used_bytes -= size
                with self._lock:
                    self._counters.cache_evictions += 1

    def _count_error(self, kind: str) -> None:
        with self._lock:
            self._counters.errors_by_kind[kind] += 1
