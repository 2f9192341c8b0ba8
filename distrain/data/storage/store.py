"""Files at any fsspec URL or in a bucket: ranged reads, atomic writes, counters."""

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
from distrain.data.storage.object_store import EXTRA_BY_SCHEME, ObjectStorage
from distrain.data.storage.retry import call_with_retries
from distrain.data.storage.url import expand_home, redact_url
from distrain.data.storage.web_storage import WebStorage, make_client_options
from distrain.errors import UserError

_T = TypeVar("_T")


@dataclass
class StorageCounters:
    """Requests of reads and their cost so far, and retries of reads and writes."""

    num_requests: int = 0
    bytes_read: int = 0
    request_seconds: float = 0.0
    """Summed over all requests, of which several run at once."""
    num_retries: int = 0
    errors_by_kind: Counter[str] = field(default_factory=Counter)
    """Failed reads by kind, and errors of the disk cache."""
    cache_hits: int = 0
    """Ranges read from the disk cache."""
    cache_evictions: int = 0
    """Ranges evicted from the disk cache."""


class Store:
    """A folder on a file system or in a bucket.

    Paths are relative to it, with `/` between parts.
    """

    def __init__(self, url: str, *, log: Callable[[str], None] | None = None) -> None:
        """Open a folder, which need not exist.

        Args:
            url: path or URL.
            log: gets a line when a read or write is retried for the first time.

        Raises:
            UserError: the URL's scheme is unknown, or its package is not installed.
        """
        url = expand_home(url)
        self.url = url
        self.redacted_url = redact_url(url)
        """The URL for messages: without user, password and query."""
        self.counters = StorageCounters()
        self._log = log
        # Guards the counters: several threads read from one store.
        self._lock = threading.Lock()
        self.backend = _open_backend(url)
        """Direct access to the files, without counters and retries."""

    @property
    def local_path(self) -> str | None:
        """Path of the folder in this machine's file system, possibly a network mount.

        None for a bucket or another fsspec URL.
        """
        return self.backend.local_path

    @property
    def fsspec_filesystem(self) -> Any:
        """Fsspec file system for the same files, for libraries that take one.

        `resolve_path` gives the paths that it takes.
        """
        return self.backend.to_fsspec()

    def resolve_path(self, path: str) -> str:
        """Return the full path of a file, as the file system knows it."""
        return self.backend.resolve_path(path)

    def read(
        self,
        path: str,
        start: int | None = None,
        end: int | None = None,
        *,
        retry_seconds: float = 0.0,
    ) -> bytes:
        """Return bytes start to end of a file, by default all of it.

        Args:
            path: the file.
            start: offset of the first byte.
            end: offset after the last byte.
            retry_seconds: seconds for which a transient failure is retried.

        Raises:
            OSError: the file cannot be read.
        """
        data = self.read_view(path, start, end, retry_seconds=retry_seconds)
        return bytes(data)

    def read_view(
        self,
        path: str,
        start: int | None = None,
        end: int | None = None,
        *,
        retry_seconds: float = 0.0,
    ) -> bytes | memoryview:
        """Return the same as `read`, without a copy.

        The copy would cost a third of what it costs to bring the bytes here.
        """

        def read_once() -> bytes | memoryview:
            with self._count_request():
                # No HTTP request can ask for an empty range.
                if start is not None and start == end:
                    return b""
                return self.backend.read(path, start, end)

        data = self._call_with_retries(read_once, retry_seconds)
        with self._lock:
            self.counters.bytes_read += len(data)
        return data

    def write(
        self,
        path: str,
        *parts: bytes | memoryview,
        retry_seconds: float = 0.0,
    ) -> None:
        """Write a file from its parts in order, so that readers see all of it or none.

        Args:
            path: the file.
            parts: its content.
            retry_seconds: seconds for which a transient failure is retried.

        Raises:
            OSError: the file cannot be written.
        """

        def write_once() -> None:
            self.backend.write(path, parts)

        self._call_with_retries(write_once, retry_seconds)

    def create_exclusive(self, path: str, data: bytes) -> None:
        """Write a file that does not exist yet.

        Of several writers, one succeeds (in a bucket, by a conditional put).

        Raises:
            FileExistsError: the file exists.
            OSError: it cannot be written.
        """
        # Not retried here: if only the answer to a put was lost, a second would find
        # the file of the first, and the writer would take it for another's.
        self.backend.create_exclusive(path, data)

    def get_size(self, path: str) -> int:
        """Return the size of a file in bytes. Raises OSError."""
        return self.backend.get_size(path)

    def get_etag(self, path: str) -> str | None:
        """Return the ETag of a file's present content, if the store has one.

        Raises OSError.
        """
        return self.backend.get_etag(path)

    def exists(self, path: str = "") -> bool:
        """Return whether a file or folder exists. Raises OSError if it is unknown."""
        return self.backend.exists(path)

    def is_folder(self, path: str) -> bool:
        """Return whether a folder of that name exists."""
        return self.backend.is_folder(path)

    def list_entries(self, path: str = "") -> list[DirectoryEntry]:
        """List a folder, sorted by name; empty if it does not exist. Raises OSError."""
        # Object stores may list the folder itself, as an entry without a name.
        entries = self.backend.list_entries(path)
        named_entries = [entry for entry in entries if entry.name]
        return sorted(named_entries, key=lambda entry: entry.name)

    def list_names(self, path: str = "") -> list[str]:
        """List the names in a folder, sorted; empty if it does not exist."""
        return [entry.name for entry in self.list_entries(path)]

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with everything in it. Raises OSError."""
        self.backend.remove(path)

    def _call_with_retries(self, call: Callable[[], _T], retry_seconds: float) -> _T:
        def count_retry(error: OSError, failures: int) -> None:
            with self._lock:
                self.counters.num_retries += 1
            if self._log is not None and failures == 1:
                self._log(
                    f"{self.redacted_url}: {error.strerror or error}: retrying for "
                    f"{retry_seconds:.0f} s"
                )

        return call_with_retries(call, retry_seconds, on_retry=count_retry)

    @contextmanager
    def _count_request(self) -> Iterator[None]:
        start_time = time.monotonic()
        error_kind = None
        try:
            yield
        except OSError as error:
            error_kind = type(error).__name__
            raise
        finally:
            with self._lock:
                self.counters.num_requests += 1
                self.counters.request_seconds += time.monotonic() - start_time
                if error_kind is not None:
                    self.counters.errors_by_kind[error_kind] += 1


def _open_backend(url: str) -> StorageBackend:
    """Open the backend for a URL's scheme. Raises UserError."""
    # Buckets first: fsspec would need another package for each of them.
    scheme = urlsplit(url).scheme
    if scheme in EXTRA_BY_SCHEME:
        return ObjectStorage(url, scheme)
    is_web = scheme in ("http", "https") and "::" not in url
    options = make_client_options(url) if is_web else {}
    try:
        filesystem, root = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot open {redact_url(url)}: {error}") from None
    if isinstance(filesystem, LocalFileSystem):
        return LocalStorage(str(root))
    if is_web:
        return WebStorage(url, filesystem, str(root))
    return FsspecStorage(url, filesystem, str(root))
