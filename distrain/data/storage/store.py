"""Files on any fsspec URL or in a bucket: whole or ranged reads, atomic writes, all of it counted."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from distrain.data.storage.backend import DirectoryEntry, StorageBackend
from distrain.data.storage.fsspec_storage import FsspecStorage
from distrain.data.storage.local import LocalStorage
from distrain.data.storage.object_store import CREDENTIALS_BY_SCHEME, ObjectStorage
from distrain.data.storage.retry import call_with_retries
from distrain.data.storage.url import redact_url
from distrain.errors import UserError

_T = TypeVar("_T")


@dataclass
class StorageCounters:
    """What reading has cost so far."""

    num_requests: int = 0
    bytes_read: int = 0
    request_seconds: float = 0.0
    """Of all requests together; several run at once."""
    num_retries: int = 0
    errors_by_kind: Counter[str] = field(default_factory=Counter)
    """Failed requests by kind."""
    cache_hits: int = 0
    """Ranges that the disk cache had."""
    cache_evictions: int = 0
    """Ranges that the disk cache let go."""


class Store:
    """A folder on a file system or in a bucket. Paths are relative to it, with `/` between parts."""

    def __init__(self, url: str) -> None:
        """Open a folder, which need not exist.

        Raises:
            UserError: the URL's scheme is unknown, or its package is not installed.
        """
        self.url = url
        self.redacted_url = redact_url(url)
        """The URL as it may be shown: without user and password."""
        self.counters = StorageCounters()
        self._lock = threading.Lock()
        self.backend = _open_backend(url)
        """Where the files are, without counts and patience."""

    @property
    def local_path(self) -> str | None:
        """The folder on this machine's disk, where it is on one."""
        return self.backend.local_path

    @property
    def fsspec_filesystem(self) -> Any:
        """The same as an fsspec file system, for others that want one; `path` is how it names files."""
        return self.backend.to_fsspec()

    def resolve_path(self, path: str) -> str:
        """The whole path of a file, as the file system knows it."""
        return self.backend.resolve_path(path)

    def read(
        self,
        path: str,
        start: int | None = None,
        end: int | None = None,
        *,
        retry_seconds: float = 0.0,
    ) -> bytes:
        """Bytes start to end of a file (all of it by default).

        Args:
            path: the file.
            start: first byte.
            end: behind the last byte.
            patience: seconds for which a failure that may pass is tried again.

        Raises:
            OSError: it cannot be read.
        """
        return bytes(self.read_view(path, start, end, retry_seconds=retry_seconds))

    def read_view(
        self,
        path: str,
        start: int | None = None,
        end: int | None = None,
        *,
        retry_seconds: float = 0.0,
    ) -> bytes | memoryview:
        """The same as `read` without a copy, which costs a third of what bringing the bytes here does."""

        def read_once() -> bytes | memoryview:
            with self._count_request():
                if start is not None and start == end:
                    return b""  # a range that nobody can ask for
                return self.backend.read(path, start, end)

        data = self._call_with_retries(read_once, retry_seconds)
        with self._lock:
            self.counters.bytes_read += len(data)
        return data

    def write(
        self, path: str, *parts: bytes | memoryview, retry_seconds: float = 0.0
    ) -> None:
        """Write a file, its parts one after another, so that readers see all of it or none. Raises OSError.

        `patience` is for how many seconds a failure that may pass is tried again.
        """
        self._call_with_retries(lambda: self.backend.write(path, parts), retry_seconds)

    def create_exclusive(self, path: str, data: bytes) -> None:
        """Write a file that is not there yet: of several writers one succeeds (in a bucket, by a conditional put).

        Raises:
            FileExistsError: it is there already.
            OSError: it cannot be written.
        """
        self.backend.create_exclusive(path, data)

    def get_size(self, path: str) -> int:
        """Bytes of a file. Raises OSError."""
        return self.backend.get_size(path)

    def get_etag(self, path: str) -> str | None:
        """What the store calls the present content of a file (an ETag), if it calls it anything. Raises OSError."""
        return self.backend.get_etag(path)

    def exists(self, path: str = "") -> bool:
        """Whether a file or folder is there. Raises OSError where that cannot be known."""
        return self.backend.exists(path)

    def is_folder(self, path: str) -> bool:
        """Whether there is a folder of that name."""
        return self.backend.is_folder(path)

    def list_entries(self, path: str = "") -> list[DirectoryEntry]:
        """What is in a folder, sorted by name; nothing where the folder is not there. Raises OSError."""
        return sorted(
            (entry for entry in self.backend.list_entries(path) if entry.name),
            key=lambda entry: entry.name,
        )

    def list_names(self, path: str = "") -> list[str]:
        """Names in a folder, sorted; none where the folder is not there."""
        return [entry.name for entry in self.list_entries(path)]

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it. Raises OSError."""
        self.backend.remove(path)

    def _call_with_retries(self, call: Callable[[], _T], retry_seconds: float) -> _T:
        def count_retry(error: OSError, failures: int) -> None:
            with self._lock:
                self.counters.num_retries += 1

        return call_with_retries(call, retry_seconds, on_retry=count_retry)

    @contextmanager
    def _count_request(self) -> Iterator[None]:
        began, kind = time.monotonic(), None
        try:
            yield
        except OSError as error:
            kind = type(error).__name__
            raise
        finally:
            with self._lock:
                self.counters.num_requests += 1
                self.counters.request_seconds += time.monotonic() - began
                if kind is not None:
                    self.counters.errors_by_kind[kind] += 1


def _open_backend(url: str) -> StorageBackend:
    """Choose what reads and writes a URL. Raises UserError."""
    scheme = urlsplit(url).scheme
    if scheme in CREDENTIALS_BY_SCHEME:
        return ObjectStorage(url, scheme)
    try:
        files, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot open {redact_url(url)}: {error}") from None
    if isinstance(files, LocalFileSystem):
        return LocalStorage(str(root))
    return FsspecStorage(url, files, str(root))
