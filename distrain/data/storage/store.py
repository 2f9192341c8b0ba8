"""Files on any fsspec URL or in a bucket: whole or ranged reads, atomic writes, all of it counted."""

import errno
import io
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from distrain.data.storage.objects import SCHEMES, Objects
from distrain.data.storage.retry import LASTING, retry
from distrain.errors import UserError

# Bytes of a large file that the kernel's cache holds while it is written.
_PIECE = 8 << 20
_T = TypeVar("_T")


class Entry(NamedTuple):
    """What a listing says of a file or folder."""

    name: str
    size: int | None
    """Bytes of a file; None: a folder, or not known."""
    folder: bool
    other: bool = False
    """A link that leads nowhere, a pipe, a device: nothing to read."""


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
        scheme = urlsplit(url).scheme
        self._objects = Objects(url, scheme) if scheme in SCHEMES else None
        self._files: Any = None
        self._root = "/".join(url.split("/")[2:]).rstrip("/")
        if self._objects is None:
            try:
                self._files, root = fsspec.core.url_to_fs(url)
            except (ValueError, ImportError) as error:
                raise UserError(f"cannot open {self.name}: {error}") from None
            self._root = str(root).rstrip("/")
        self.local = (self._root or "/") if isinstance(self._files, LocalFileSystem) else None
        """The folder on this machine's disk, where it is on one."""

    @property
    def file_system(self) -> Any:
        """The same as an fsspec file system, for others that want one; `path` is how it names files."""
        if self._objects is not None:
            return self._objects.file_system()
        return self._files

    def read(self, path: str, start: int | None = None, end: int | None = None, *, patience: float = 0.0) -> bytes:
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
        self, path: str, start: int | None = None, end: int | None = None, *, patience: float = 0.0
    ) -> bytes | memoryview:
        """The same as `read` without a copy, which costs a third of what bringing the bytes here does."""

        def read() -> bytes | memoryview:
            with self._counted():
                return self._read(path, start, end)

        data = self._patiently(read, patience)
        with self._lock:
            self.counts.bytes += len(data)
        return data

    def _read(self, path: str, start: int | None, end: int | None) -> bytes | memoryview:
        if start is not None and start == end:
            return b""  # a range that nobody can ask for
        if self._objects is not None:
            return self._objects.read(self._key(path), start, end)
        with self._plainly(path):
            return bytes(self._files.cat_file(self.path(path), start=start, end=end))

    def _patiently(self, act: Callable[[], _T], patience: float) -> _T:
        def again(error: OSError, failures: int) -> None:
            with self._lock:
                self.counts.retries += 1

        return retry(act, patience, again=again)

    @contextmanager
    def _plainly(self, path: str) -> Iterator[None]:
        """Every error of a client as an OSError, of its kind, and without the URL's secrets."""
        try:
            yield
        except OSError as error:
            if self.local is not None:
                raise
            if isinstance(error, LASTING):
                raise type(error)(f"{self.name}/{path}") from None
            raise OSError(self._without_secrets(str(error))) from None
        except RecursionError:  # of the caller, whose stack was full already
            raise
        except Exception as error:  # clients have errors of their own for a broken connection
            raise OSError(self._without_secrets(f"{type(error).__name__}: {error}")) from None

    def _without_secrets(self, text: str) -> str:
        for part in self.url.split("::"):
            pieces = urlsplit(part)
            for secret in (pieces.netloc.rpartition("@")[0], pieces.query):
                text = text.replace(secret, "***") if secret else text
        return text

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

    def write(self, path: str, *parts: bytes | memoryview, patience: float = 0.0) -> None:
        """Write a file, its parts one after another, so that readers see all of it or none. Raises OSError.

        `patience` is for how many seconds a failure that may pass is tried again.
        """
        self._patiently(lambda: self._write(path, parts), patience)

    def _write(self, path: str, parts: tuple[bytes | memoryview, ...]) -> None:
        if self._objects is not None:
            self._objects.write(self._key(path), parts)
            return
        target = self.path(path)
        if self.local is None:  # an object appears whole, or not at all
            self._pipe(target, b"".join(parts))
            return
        partial = f"{target}.{secrets.token_hex(4)}.partial"
        _write_new(partial, *parts)
        try:
            os.replace(partial, target)
        except BaseException:
            os.unlink(partial)
            raise

    def _pipe(self, target: str, data: bytes) -> None:
        if urlsplit(self.url).scheme in ("http", "https", "zip"):
            raise OSError(errno.EROFS, f"{self.name} can only be read")
        with self._plainly(""):
            self._files.pipe_file(target, data)

    def create(self, path: str, data: bytes) -> None:
        """Write a file that is not there yet: of several writers one succeeds (in a bucket, by a conditional put).

        Raises:
            FileExistsError: it is there already.
            OSError: it cannot be written.
        """
        if self._objects is not None:
            self._objects.write(self._key(path), [data], new=True)
        elif self.local is None:
            self._files.pipe_file(self.path(path), data, mode="create")
        else:
            _write_new(self.path(path), data)

    def size(self, path: str) -> int:
        """Bytes of a file. Raises OSError."""
        if self._objects is not None:
            return self._objects.size(self._key(path))
        return int(self._info(path)["size"])

    def version(self, path: str) -> str | None:
        """What the store calls the present content of a file (an ETag), if it calls it anything. Raises OSError."""
        if self._objects is not None:
            return self._objects.version(self._key(path))
        tag = self._info(path).get("ETag")
        return None if tag is None else str(tag)

    def _info(self, path: str) -> dict[str, Any]:
        with self._plainly(path):
            return dict(self._files.info(self.path(path)))

    def exists(self, path: str = "") -> bool:
        """Whether a file or folder is there. Raises OSError where that cannot be known."""
        if self._objects is None:
            with self._plainly(path):
                return bool(self._files.exists(self.path(path)))
        try:
            self.size(path)
        except FileNotFoundError:
            return self.is_folder(path)
        return True

    def is_folder(self, path: str) -> bool:
        """Whether there is a folder of that name."""
        if self._objects is not None:
            return bool(self._objects.list(self._key(path)))
        with self._plainly(path):
            return bool(self._files.isdir(self.path(path)))

    def entries(self, path: str = "") -> list[Entry]:
        """What is in a folder, sorted by name; nothing where the folder is not there. Raises OSError."""
        if self._objects is not None:
            found = [Entry(*entry) for entry in self._objects.list(self._key(path))]
        else:
            try:
                with self._plainly(path):
                    listed = self._files.ls(self.path(path), detail=True, refresh=True)
            except FileNotFoundError:
                return []
            found = []
            for entry in listed:
                folder = entry["type"] == "directory"
                if self.local is not None and entry["type"] not in ("file", "directory"):  # a link is what it leads to
                    folder = os.path.isdir(entry["name"])
                    if not folder and not os.path.isfile(entry["name"]):
                        found.append(Entry(PurePosixPath(entry["name"]).name, None, False, other=True))
                        continue
                found.append(Entry(PurePosixPath(entry["name"]).name, None if folder else entry.get("size"), folder))
        return sorted((entry for entry in found if entry.name), key=lambda entry: entry.name)

    def list(self, path: str = "") -> list[str]:
        """Names in a folder, sorted; none where the folder is not there."""
        if self._objects is not None:
            return [entry.name for entry in self.entries(path)]
        try:  # names alone: with details, a file that goes meanwhile would fail it
            with self._plainly(path):
                entries = self._files.ls(self.path(path), detail=False, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(PurePosixPath(entry).name for entry in entries)

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it."""
        if self._objects is not None:
            self._objects.remove(self._key(path))
        else:
            with self._plainly(path):
                self._files.rm(self.path(path), recursive=True)

    def path(self, path: str) -> str:
        """The whole path of a file, as the file system knows it."""
        if self._root or self.local is not None:
            return f"{self._root}/{path}" if path else self._root or "/"
        return path  # right under the root of an archive

    def _key(self, path: str) -> str:
        """A file's name in its bucket."""
        prefix = self._root.partition("/")[2]
        return f"{prefix}/{path}".strip("/") if path else prefix


def _write_new(path: str, *parts: bytes | memoryview) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "xb", buffering=0) as file:
        try:
            for part in parts:
                view = memoryview(part)
                for start in range(0, len(view), _PIECE):
                    _write_all(file, view[start : start + _PIECE])
                    if len(view) > _PIECE:
                        _let_go(file)
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(path)  # a disk that is full takes names without content
            raise


def _write_all(file: io.FileIO, view: memoryview) -> None:
    while view:
        view = view[file.write(view) :]


def _let_go(file: io.FileIO) -> None:
    """Have the kernel write what it caches of a file, and forget it: a checkpoint must not push the data set out.

    It also saves most of the CPU time: half a gigabyte into cache pages that are used again and again takes 0.13 s,
    into new ones 1.1 s.
    """
    if hasattr(os, "posix_fadvise"):
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def redacted(url: str) -> str:
    """A URL, or a chain of them, without user, password and query."""
    shown = []
    for part in url.split("::"):
        pieces = urlsplit(part)
        secret = pieces._replace(netloc=pieces.netloc.rpartition("@")[2], query="")
        shown.append(urlunsplit(secret) if "://" in part else part)
    return "::".join(shown)
