"""A folder on this machine's disk, or on a network file system that is mounted here."""

import errno
import io
import os
import secrets
import shutil
from collections.abc import Sequence
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.retry import is_transient

_MAX_OFFSET = (1 << 63) - 1
# Names under which nothing can be: a link in a circle, a name that is too long.
_ABSENT_ERRNOS = (errno.ELOOP, errno.ENAMETOOLONG)
# Bytes of a large file that the kernel's cache holds while it is written.
_WRITE_CHUNK_BYTES = 8 << 20


class LocalStorage:
    """Files by the system's own calls."""

    def __init__(self, root: str) -> None:
        """Take an absolute path; the folder need not exist."""
        self._root = root.rstrip("/")
        self.local_path: str | None = self._root or "/"

    def to_fsspec(self) -> Any:
        """fsspec's for this machine."""
        return LocalFileSystem()

    def resolve_path(self, path: str) -> str:
        """The absolute path."""
        whole = f"{self._root}/{path}" if path else self._root or "/"
        if "\0" in whole:
            raise OSError(errno.EINVAL, "a path with a NUL in it", whole)
        return whole

    def read(self, path: str, start: int | None, end: int | None) -> bytes:
        """Bytes start to end."""
        start = start or 0
        if max(start, end or 0) > _MAX_OFFSET:
            raise OSError(
                errno.EINVAL,
                f"no file has a byte {max(start, end or 0)}",
                self.resolve_path(path),
            )
        with open(self.resolve_path(path), "rb", buffering=0) as file:
            if start:
                file.seek(start)
            if end is None:
                return file.readall()
            # As much as is there: a buffer is made for all that is asked.
            return _read_all(file, min(end, os.fstat(file.fileno()).st_size) - start)

    def write(self, path: str, parts: Sequence[bytes | memoryview]) -> None:
        """Write a file beside its place, and move it there."""
        target = self.resolve_path(path)
        partial = f"{target}.{secrets.token_hex(4)}.partial"
        _write_new_file(partial, parts)
        try:
            os.replace(partial, target)
        except BaseException:
            os.unlink(partial)
            raise

    def create_exclusive(self, path: str, data: bytes) -> None:
        """Write a file that is not there yet."""
        _write_new_file(self.resolve_path(path), [data])

    def get_size(self, path: str) -> int:
        """Bytes of a file."""
        return os.stat(self.resolve_path(path)).st_size

    def get_etag(self, path: str) -> str | None:
        """None: a file system has no name for a content."""
        self.get_size(path)
        return None

    def exists(self, path: str) -> bool:
        """Return whether a file or folder exists and may be looked at."""
        try:
            os.stat(self.resolve_path(path))
        except OSError as error:
            if is_transient(error) and error.errno not in _ABSENT_ERRNOS:
                raise
            return False
        return True

    def is_folder(self, path: str) -> bool:
        """Return whether there is a folder of that name."""
        return os.path.isdir(self.resolve_path(path))

    def list_entries(self, path: str) -> list[DirectoryEntry]:
        """List a folder; a link is listed as its target."""
        try:
            with os.scandir(self.resolve_path(path)) as listed:
                return [
                    entry
                    for found in listed
                    if (entry := _stat_entry(found)) is not None
                ]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it."""
        target = self.resolve_path(path)
        if os.path.isdir(target) and not os.path.islink(target):
            shutil.rmtree(target)
        else:
            os.unlink(target)


def _stat_entry(dir_entry: "os.DirEntry[str]") -> DirectoryEntry | None:
    """Look at one entry; None: it was removed meanwhile."""
    try:
        if dir_entry.is_dir():
            return DirectoryEntry(dir_entry.name, None, True)
        if dir_entry.is_file():
            return DirectoryEntry(dir_entry.name, dir_entry.stat().st_size, False)
        dir_entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    except OSError:  # a link in a circle, or to where nobody may look
        if not dir_entry.is_symlink():
            raise
    return DirectoryEntry(dir_entry.name, None, False, is_special=True)


def _read_all(file: io.FileIO, size: int) -> bytes:
    """So many bytes: one call reads 2 GiB at most."""
    parts = list[bytes]()
    while size > 0 and (data := file.read(size)):
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


def _write_new_file(path: str, parts: Sequence[bytes | memoryview]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "xb", buffering=0) as file:
        try:
            for part in parts:
                view = memoryview(part)
                for start in range(0, len(view), _WRITE_CHUNK_BYTES):
                    _write_all(file, view[start : start + _WRITE_CHUNK_BYTES])
                    if len(view) > _WRITE_CHUNK_BYTES:
                        _drop_page_cache(file)
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(path)  # a disk that is full takes names without content
            raise


def _write_all(file: io.FileIO, view: memoryview) -> None:
    while view:
        view = view[file.write(view) :]


def _drop_page_cache(file: io.FileIO) -> None:
    """Have the kernel write what it caches of a file, and forget it: a checkpoint must not push the data set out.

    It also saves most of the CPU time: half a gigabyte into cache pages that are used again and again takes 0.13 s,
    into new ones 1.1 s.
    """
    if hasattr(os, "posix_fadvise"):
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
