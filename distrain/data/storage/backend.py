"""The interface behind `Store`: a folder on this machine, a bucket, or any file system of fsspec's."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


class DirectoryEntry(NamedTuple):
    """A line of a listing: a file or a folder."""

    name: str
    size: int | None
    """Bytes of a file; None: a folder, or not known."""
    is_folder: bool
    is_special: bool = False
    """A link that leads nowhere, a pipe, a device: nothing to read."""


class StorageBackend(Protocol):
    """A folder. Paths are relative to it, with `/` between parts.

    Every method raises OSError, of the kind that a file system would raise, and never with a secret of the URL.
    """

    local_path: str | None
    """The folder on this machine's disk, where it is on one."""

    def to_fsspec(self) -> Any:
        """The same as an fsspec file system; `path` is how it names files."""
        ...

    def resolve_path(self, path: str) -> str:
        """The whole path of a file, as the file system knows it."""
        ...

    def read(self, path: str, start: int | None, end: int | None) -> bytes | memoryview:
        """Bytes start to end of a file; None: from its beginning, to its end."""
        ...

    def write(self, path: str, parts: Sequence[bytes | memoryview]) -> None:
        """Write a file, so that readers see all of it or none."""
        ...

    def create_exclusive(self, path: str, data: bytes) -> None:
        """Write a file that is not there yet. Raises FileExistsError."""
        ...

    def get_size(self, path: str) -> int:
        """Bytes of a file."""
        ...

    def get_etag(self, path: str) -> str | None:
        """Return the name of a file's present content (an ETag); None where there are no such names."""
        ...

    def exists(self, path: str) -> bool:
        """Return whether a file or folder exists. One that may not be looked at counts as absent."""
        ...

    def is_folder(self, path: str) -> bool:
        """Return whether there is a folder of that name."""
        ...

    def list_entries(self, path: str) -> list[DirectoryEntry]:
        """List a folder, in any order; empty where there is no folder of that name."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it."""
        ...
