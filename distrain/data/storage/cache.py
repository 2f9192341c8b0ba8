"""A bounded cache of byte ranges on this machine's disk, shared by all processes that use its folder.

An entry is a file of its own: written aside and renamed, so that it is whole or not there, and held against its
checksum at every read. The least recently used go first. Whoever still reads an entry that is let go keeps reading it:
an open file outlives its name. A folder that is full, damaged or deleted costs reads from the store, never a run.
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
# The share of the limit that a process adds before it looks at the folder's size again.
_CHECKS_PER_LIMIT = 64


class DiskCache:
    """Ranges by key. Never raises an error of the disk: what does not work is counted as an error."""

    def __init__(
        self, folder: str, limit_bytes: int, counters: StorageCounters
    ) -> None:
        """Open the folder, and clear away what processes that were killed have left half written."""
        self._folder, self._limit_bytes, self._counters = (
            Path(folder).expanduser(),
            limit_bytes,
            counters,
        )
        self._lock, self._unchecked_bytes = (
            threading.Lock(),
            limit_bytes,
        )  # a look at the first one
        with suppress(OSError):
            for partial in self._folder.glob(f"*{_PARTIAL_SUFFIX}"):
                with partial.open("rb") as file, suppress(OSError):
                    fcntl.flock(
                        file, fcntl.LOCK_EX | fcntl.LOCK_NB
                    )  # held by its writer while that lives
                    partial.unlink(missing_ok=True)

    @staticmethod
    def make_key(*parts: object) -> str:
        """A key for a range of a file of a version of a data set."""
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]

    def get_range(self, key: str, checksum: int) -> bytes | None:
        """The range, where it is there and its CRC-32C is right; a damaged one is removed."""
        path = self._folder / f"{key}{_RANGE_SUFFIX}"
        try:
            data = path.read_bytes()
            if crc32c(data) != checksum:
                path.unlink(missing_ok=True)
                self._count_error("damaged cache entry")
                return None
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
        """Keep a range, if there is room for it on the disk."""
        if len(data) > self._limit_bytes:
            return
        partial = (
            self._folder
            / f"{key}.{os.getpid()}.{threading.get_ident()}{_PARTIAL_SUFFIX}"
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._lock:
                self._unchecked_bytes += len(data)
                look = self._unchecked_bytes > self._limit_bytes // _CHECKS_PER_LIMIT
                self._unchecked_bytes = 0 if look else self._unchecked_bytes
            if look:
                self._evict_ranges(len(data) + self._limit_bytes // _CHECKS_PER_LIMIT)
            with partial.open("xb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(data)
                file.flush()
                os.replace(partial, self._folder / f"{key}{_RANGE_SUFFIX}")
        except OSError as error:
            self._count_error(f"cache: {error.strerror or type(error).__name__}")
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _evict_ranges(self, needed_bytes: int) -> None:
        """Let the least recently used entries go until `size` bytes fit; one process at a time."""
        with (self._folder / _LOCK_FILE).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = []
            for entry in os.scandir(self._folder):
                with suppress(FileNotFoundError):
                    if entry.name.endswith(_RANGE_SUFFIX):
                        status = entry.stat()
                        entries.append((status.st_mtime_ns, status.st_size, entry.path))
            used = sum(size for _, size, _ in entries)
            for _, freed, path in sorted(entries):
                if used + needed_bytes <= self._limit_bytes:
                    return
                Path(path).unlink(missing_ok=True)
                used -= freed
                with self._lock:
                    self._counters.cache_evictions += 1

    def _count_error(self, kind: str) -> None:
        with self._lock:
            self._counters.errors_by_kind[kind] += 1
