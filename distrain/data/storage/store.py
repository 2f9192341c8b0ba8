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

from distrain.data.storage.backend import Backend, Entry
from distrain.data.storage.local import LocalFolder
from distrain.data.storage.objects import SCHEMES, Bucket
from distrain.data.storage.remote import RemoteFolder
from distrain.data.storage.retry import retry
from distrain.data.storage.url import redacted
from distrain.errors import UserError

_T = TypeVar("_T")


@dataclass
class Counts:
    """What reading has cost so far."""

    requests: int = 0
    bytes: int = 0
    seconds: float = 0.0
    """Of all requests together; several run at once."""
    retries: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """Failed requests by kind."""
    hits: int = 0
    """Ranges that the disk cache had."""
    evictions: int = 0
    """Ranges that the disk cache let go."""


class Store:
    """A folder on a file system or in a bucket. Paths are relative to it, with `/` between parts."""

    def __init__(self, url: str) -> None:
        """Open a folder, which need not exist.

        Raises:
            UserError: the URL's scheme is unknown, or its package is not installed.
        """
        self.url = url
        self.name = redacted(url)
        """The URL as it may be shown: without user and password."""
        self.counts = Counts()
        self._lock = threading.Lock()
        self.backend = _open(url)
        """Where the files are, without counts and patience."""

    @property
    def local(self) -> str | None:
        """The folder on this machine's disk, where it is on one."""
        return self.backend.local

    @property
    def file_system(self) -> Any:
        """The same as an fsspec file system, for others that want one; `path` is how it names files."""
        return self.backend.file_system()

    def path(self, path: str) -> str:
        """The whole path of a file, as the file system knows it."""
        return self.backend.path(path)

    def read(
        self,
        path: str,
        start: int | None = None,
        end: int | None = None,
        *,
        patience: float = 0.0,
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
        return bytes(self.view(path, start, end, patience=patience))

    def view(
        self,
        path: str,
        start: int | None = None,
        end: int | None = None,
        *,
        patience: float = 0.0,
    ) -> bytes | memoryview:
        """The same as `read` without a copy, which costs a third of what bringing the bytes here does."""

        def read() -> bytes | memoryview:
            with self._counted():
                if start is not None and start == end:
                    return b""  # a range that nobody can ask for
                return self.backend.read(path, start, end)

        data = self._patiently(read, patience)
        with self._lock:
            self.counts.bytes += len(data)
        return data

    def write(
        self, path: str, *parts: bytes | memoryview, patience: float = 0.0
    ) -> None:
        """Write a file, its parts one after another, so that readers see all of it or none. Raises OSError.

        `patience` is for how many seconds a failure that may pass is tried again.
        """
        self._patiently(lambda: self.backend.write(path, parts), patience)

    def create(self, path: str, data: bytes) -> None:
        """Write a file that is not there yet: of several writers one succeeds (in a bucket, by a conditional put).

        Raises:
            FileExistsError: it is there already.
            OSError: it cannot be written.
        """
        self.backend.create(path, data)

    def size(self, path: str) -> int:
        """Bytes of a file. Raises OSError."""
        return self.backend.size(path)

    def version(self, path: str) -> str | None:
        """What the store calls the present content of a file (an ETag), if it calls it anything. Raises OSError."""
        return self.backend.version(path)

    def exists(self, path: str = "") -> bool:
        """Whether a file or folder is there. Raises OSError where that cannot be known."""
        return self.backend.exists(path)

    def is_folder(self, path: str) -> bool:
        """Whether there is a folder of that name."""
        return self.backend.is_folder(path)

    def entries(self, path: str = "") -> list[Entry]:
        """What is in a folder, sorted by name; nothing where the folder is not there. Raises OSError."""
        return sorted(
            (entry for entry in self.backend.entries(path) if entry.name),
            key=lambda entry: entry.name,
        )

    def list(self, path: str = "") -> list[str]:
        """Names in a folder, sorted; none where the folder is not there."""
        return [entry.name for entry in self.entries(path)]

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it. Raises OSError."""
        self.backend.remove(path)

    def _patiently(self, act: Callable[[], _T], patience: float) -> _T:
        def again(error: OSError, failures: int) -> None:
            with self._lock:
                self.counts.retries += 1

        return retry(act, patience, again=again)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        began, kind = time.monotonic(), None
        try:
            yield
        except OSError as error:
            kind = type(error).__name__
            raise
        finally:
            with self._lock:
                self.counts.requests += 1
                self.counts.seconds += time.monotonic() - began
                if kind is not None:
                    self.counts.errors[kind] += 1


def _open(url: str) -> Backend:
    """Choose what reads and writes a URL. Raises UserError."""
    scheme = urlsplit(url).scheme
    if scheme in SCHEMES:
        return Bucket(url, scheme)
    try:
        files, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot open {redacted(url)}: {error}") from None
    if isinstance(files, LocalFileSystem):
        return LocalFolder(str(root))
    return RemoteFolder(url, files, str(root))
