"""Verified reads of byte ranges of shards, with retries and a disk cache."""

import threading
import time
from collections import OrderedDict

from crc32c import crc32c

from distrain.data.shards.entries import Shard
from distrain.data.shards.manifest import Manifest
from distrain.data.shards.parquet import Footer, parse_footer
from distrain.data.storage.cache import DiskCache
from distrain.data.storage.store import Store
from distrain.errors import AttemptError

# Footers are cached as bytes, as they are in their files: a parsed footer takes
# thirteen times the memory, and parsing one takes only 0.1 ms.
_FOOTER_CACHE_BYTES = 16 << 20
# A wrong checksum may come from the transfer: damage is certain only after some reads.
_MAX_DAMAGED_READS = 4


class ShardReader:
    """Byte ranges and footers of a data set's shards. Several threads may use it."""

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        retry_seconds: float,
        disk_cache: DiskCache | None,
    ) -> None:
        """Read from a store.

        Args:
            store: where the shards are.
            manifest: checksums of the shards.
            retry_seconds: seconds for which a read that fails is retried.
            disk_cache: keeps ranges on this machine's disk.
        """
        self._store = store
        self._manifest = manifest
        self._retry_seconds = retry_seconds
        self._disk_cache = disk_cache
        self._footer_cache: OrderedDict[str, bytes] = OrderedDict()
        self._footer_cache_bytes = 0
        # Guards the footer cache.
        self._lock = threading.Lock()

    def read_footer(self, shard: Shard) -> Footer:
        """Return the parsed footer of a Parquet shard, from memory if it is cached.

        Raises:
            AttemptError: as in `read_range`.
        """
        with self._lock:
            data = self._footer_cache.get(shard.path)
        if data is None:
            # Read without the lock, so that other threads do not wait for the store.
            data = bytes(
                self.read_range(
                    shard, shard.footer_start, shard.bytes, shard.footer_crc32c
                )
            )
            with self._lock:
                # Another thread may have read the same footer meanwhile.
                if shard.path not in self._footer_cache:
                    self._footer_cache[shard.path] = data
                    self._footer_cache_bytes += len(data)
                # Evict the footers that were read first.
                while self._footer_cache_bytes > _FOOTER_CACHE_BYTES:
                    _, evicted = self._footer_cache.popitem(last=False)
                    self._footer_cache_bytes -= len(evicted)
        return parse_footer(data)

    def read_range(
        self, shard: Shard, start: int, end: int, checksum: int
    ) -> bytes | memoryview:
        """Return bytes start to end of a shard, from the disk cache if it has them.

        Raises:
            AttemptError: they cannot be read, or their CRC-32C is not `checksum`.
        """
        if self._disk_cache is None:
            return self._read_from_store(shard, start, end, checksum)
        key = DiskCache.make_key(
            self._manifest.fingerprint, shard.path, start, end, checksum
        )
        cached = self._disk_cache.get_range(key, checksum)
        if cached is not None:
            return cached
        data = self._read_from_store(shard, start, end, checksum)
        self._disk_cache.put_range(key, data)
        return data

    def _read_from_store(
        self, shard: Shard, start: int, end: int, checksum: int
    ) -> bytes | memoryview:
        """Read and verify a range.

        A failure never makes a bad sample: it is retried, then ends the attempt.
        """
        shard_url = f"{self._store.redacted_url}/{shard.path}"
        # One deadline for all reads, those of damaged bytes included.
        deadline = time.monotonic() + self._retry_seconds
        for _ in range(_MAX_DAMAGED_READS):
            try:
                data = self._store.read_view(
                    shard.path, start, end, retry_seconds=deadline - time.monotonic()
                )
            except FileNotFoundError:
                raise AttemptError(
                    f"{shard_url} is missing: restore it, or pack or index it again"
                ) from None
            except PermissionError as error:
                raise AttemptError(
                    f"{shard_url} is not readable ({error}): check its permissions"
                ) from None
            except OSError as error:
                raise AttemptError(
                    self._explain_replacement(shard)
                    or f"{shard_url} cannot be read ({error}), "
                    f"retried for {self._retry_seconds:.0f} s: "
                    "fix the storage"
                ) from error
            if len(data) == end - start and crc32c(data) == checksum:
                return data
        raise AttemptError(
            self._explain_replacement(shard)
            or f"{shard_url} is damaged: bytes {start} to {end}, "
            f"read {_MAX_DAMAGED_READS} times, do not match the manifest's checksum: "
            "restore the shard, or pack or index it again"
        )

    def _explain_replacement(self, shard: Shard) -> str | None:
        """Return a message if a shard's size or ETag is not the manifest's."""
        try:
            size = self._store.get_size(shard.path)
            etag = None
            if shard.version is not None:
                etag = self._store.get_etag(shard.path)
        except OSError:
            # The store does not answer: the caller reports the read that failed.
            return None
        if size != shard.bytes:
            difference = f"has {size} bytes, but had {shard.bytes}"
        elif etag is not None and etag != shard.version:
            difference = f"has ETag {etag}, but had {shard.version}"
        else:
            return None
        return (
            f"{self._store.redacted_url}/{shard.path} {difference} when its manifest "
            "was written: it was replaced or truncated; restore it, or pack the data "
            "set again"
        )
