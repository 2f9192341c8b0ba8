"""Interface of what `Store` reads and writes: a local folder, a bucket, or fsspec."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


class DirectoryEntry(NamedTuple):
    """One file or folder in a listing."""

    name: str
    size: int | None
    """Bytes of a file; None for a folder, or if the size is not known."""
    is_folder: bool
    is_special: bool = False
    """True for what cannot be read: a broken link, a pipe, a device, an odd key."""
    problem: str = "a broken link or a device"
    """What it is, if it is special."""


class StorageBackend(Protocol):
    """A folder. Paths are relative to it, with `/` between parts.

    Every method raises OSError, of the subclass that a file system would raise, and
    never with a secret of the URL in the message.
    """

    local_path: str | None
    """Path of the folder in this machine's file system, possibly a network mount; None
    for a bucket or another fsspec URL."""

    def to_fsspec(self) -> Any:
        """Return an fsspec file system for the same files.

        `resolve_path` gives the paths that it takes.
        """
        ...

    def resolve_path(self, path: str) -> str:
        """Return the full path of a file, as the file system knows it."""
        ...

    def read(self, path: str, start: int | None, end: int | None) -> bytes | memoryview:
        """Return bytes start to end of a file; None means its beginning or its end."""
        ...

    def write(self, path: str, parts: Sequence[bytes | memoryview]) -> None:
        """Write a file, so that readers see all of it or none."""
        ...

    def create_exclusive(self, path: str, data: bytes) -> None:
        """Write a file that does not exist yet. Raises FileExistsError."""
        ...

    def get_size(self, path: str) -> int:
        """Return the size of a file in bytes."""
        ...

    def get_etag(self, path: str) -> str | None:
        """Return the ETag of a file's present content; None if there are no ETags."""
        ...

    def exists(self, path: str) -> bool:
        """Return whether a file or folder exists; one that is forbidden does not."""
        ...

    def is_folder(self, path: str) -> bool:
        """Return whether a folder of that name exists."""
        ...

    def list_entries(self, path: str) -> list[DirectoryEntry]:
        """List a folder, in any order; empty if the folder does not exist."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with everything in it."""
        ...
