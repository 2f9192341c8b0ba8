"""A folder on this machine's disk, or on a network file system that is mounted here."""

import errno
import io
import os
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.retry import is_transient

_MAX_OFFSET = (1 << 63) - 1
# A path with one of these errors cannot name a file: a circular link, a name too long.
_ABSENT_ERRNOS = (errno.ELOOP, errno.ENAMETOOLONG)
# What fsync of a folder returns on file systems that have no such thing.
_NO_FOLDER_SYNC_ERRNOS = (errno.EINVAL, errno.ENOTSUP)
# Bytes of a large file in the kernel's page cache while it is written.
_WRITE_CHUNK_BYTES = 8 << 20


class LocalStorage:
    """Files through the operating system's calls."""

    def __init__(self, root: str) -> None:
        """Take an absolute path; the folder need not exist."""
        self._root = root.rstrip("/")
        self.local_path: str | None = self._root or "/"

    def to_fsspec(self) -> Any:
        """Return fsspec's file system for this machine."""
        return LocalFileSystem()

    def resolve_path(self, path: str) -> str:
        """Return the absolute path of a file."""
        full_path = self._root or "/"
        if path:
            full_path = f"{self._root}/{path}"
        # The system's calls would raise ValueError, but callers handle OSError.
        if "\0" in full_path:
            raise OSError(errno.EINVAL, "the path contains a NUL character", full_path)
        return full_path

    def read(self, path: str, start: int | None, end: int | None) -> bytes:
        """Return bytes start to end of a file."""
        start = start or 0
        full_path = self.resolve_path(path)
        # The system's calls would raise OverflowError, but callers handle OSError.
        max_offset = max(start, end or 0)
        if max_offset > _MAX_OFFSET:
            message = f"byte {max_offset} is beyond the largest possible file"
            raise OSError(errno.EINVAL, message, full_path)
        with open(full_path, "rb", buffering=0) as file:
            if start:
                file.seek(start)
            if end is None:
                return file.readall()
            # Ask for no more than the file has: Python allocates all that is asked for.
            file_size = os.fstat(file.fileno()).st_size
            num_bytes = min(end, file_size) - start
            return _read_all(file, num_bytes)

    def write(self, path: str, parts: Sequence[bytes | memoryview]) -> None:
        """Write a file under a temporary name beside its own, then rename it."""
        target = self.resolve_path(path)
        # A random name, because several processes may write the same file at once.
        partial = f"{target}.{secrets.token_hex(4)}.partial"
        try:
            _write_new_file(partial, parts)
            os.replace(partial, target)
        # Ctrl-C may come anywhere, also once the file has been removed or renamed.
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
        _sync_folder(os.path.dirname(target))

    def create_exclusive(self, path: str, data: bytes) -> None:
        """Write a file that does not exist yet. Raises FileExistsError."""
        target = self.resolve_path(path)
        _write_new_file(target, [data])
        _sync_folder(os.path.dirname(target))

    def get_size(self, path: str) -> int:
        """Return the size of a file in bytes."""
        return os.stat(self.resolve_path(path)).st_size

    def get_etag(self, path: str) -> str | None:
        """Return None: a file system has no ETags. Raises OSError if it is missing."""
        self.get_size(path)
        return None

    def exists(self, path: str) -> bool:
        """Return whether a file or folder exists and its metadata can be read.

        Raises:
            OSError: the answer cannot be known, for instance after an I/O error.
        """
        try:
            os.stat(self.resolve_path(path))
        except OSError as error:
            if is_transient(error) and error.errno not in _ABSENT_ERRNOS:
                raise
            return False
        return True

    def is_folder(self, path: str) -> bool:
        """Return whether a folder of that name exists."""
        return os.path.isdir(self.resolve_path(path))

    def list_entries(self, path: str) -> list[DirectoryEntry]:
        """List a folder, with links as their targets; empty if it does not exist."""
        try:
            with os.scandir(self.resolve_path(path)) as dir_entries:
                entries = [_stat_entry(dir_entry) for dir_entry in dir_entries]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [entry for entry in entries if entry is not None]

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with everything in it."""
        target = self.resolve_path(path)
        # Of a link to a folder, remove the link alone.
        is_link = os.path.islink(target)
        if os.path.isdir(target) and not is_link:
            shutil.rmtree(target)
        else:
            os.unlink(target)


def _stat_entry(dir_entry: "os.DirEntry[str]") -> DirectoryEntry | None:
    """Describe one entry; None if it was removed meanwhile."""
    name = dir_entry.name
    try:
        if dir_entry.is_dir():
            return DirectoryEntry(name, None, True)
        if dir_entry.is_file():
            size = dir_entry.stat().st_size
            return DirectoryEntry(name, size, False)
        # Raises FileNotFoundError if it was removed; a broken link itself is found.
        dir_entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    except OSError:
        # A circular link, or one to a target whose metadata cannot be read.
        if not dir_entry.is_symlink():
            raise
    return DirectoryEntry(name, None, False, is_special=True)


def _read_all(file: io.FileIO, size: int) -> bytes:
    """Read `size` bytes, or up to the end of the file."""
    # In a loop, because one call reads at most 2 GiB.
    parts = list[bytes]()
    while size > 0 and (data := file.read(size)):
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


def _write_new_file(path: str, parts: Sequence[bytes | memoryview]) -> None:
    _make_folder(os.path.dirname(path))
    with open(path, "xb", buffering=0) as file:
        try:
            for part in parts:
                view = memoryview(part)
                for start in range(0, len(view), _WRITE_CHUNK_BYTES):
                    end = start + _WRITE_CHUNK_BYTES
                    _write_all(file, view[start:end])
                    # A small part may stay in the page cache: it takes little room.
                    if len(view) > _WRITE_CHUNK_BYTES:
                        _drop_page_cache(file)
            # Before a caller renames the file: the new name must have its content
            # even after a power failure.
            os.fsync(file.fileno())
        except BaseException as error:
            # A full disk still creates names, whose content is then missing.
            os.unlink(path)
            # The system names no file when it cannot write all of one.
            if isinstance(error, OSError):
                error.filename = path
            raise


def _make_folder(path: str) -> None:
    """Create a folder and its parents, as names that survive a power failure."""
    parents: list[str] = []
    folder = path
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
        parents.append(folder)
    os.makedirs(path, exist_ok=True)
    for parent in parents:
        _sync_folder(parent)


def _sync_folder(path: str) -> None:
    """Flush the names in a folder to disk.

    Otherwise a power failure could lose the name of a new checkpoint after the old one
    was removed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        # Files may be written to a folder that may not be listed.
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC_ERRNOS:
            raise
    finally:
        os.close(descriptor)


def _write_all(file: io.FileIO, view: memoryview) -> None:
    # An unbuffered write may take only some of the bytes.
    while view:
        num_written = file.write(view)
        view = view[num_written:]


def _drop_page_cache(file: io.FileIO) -> None:
    """Flush a file's pages in the kernel's cache to disk, and drop them.

    Otherwise a checkpoint would evict the data set from that cache. It also saves most
    of the CPU time: half a gigabyte through pages that are reused takes 0.13 s, through
    new ones 1.1 s.
    """
    if hasattr(os, "posix_fadvise"):
        descriptor = file.fileno()
        # Only pages that are on the disk already can be dropped.
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
