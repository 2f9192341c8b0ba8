"""A folder on any file system of fsspec's: a web server, an archive, HDFS, SFTP and the rest."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from distrain.data.storage.backend import Entry
from distrain.data.storage.retry import LASTING
from distrain.data.storage.url import redacted

_READ_ONLY = ("http", "https", "zip")


class RemoteFolder:
    """Files by an fsspec client, whose errors become OSErrors without the URL's secrets."""

    local: str | None = None

    def __init__(self, url: str, files: Any, root: str) -> None:
        """Take the URL, and the file system and the path that fsspec makes of it."""
        self._url, self._files = url, files
        self._name = redacted(url)
        self._root = root.rstrip("/")

    def file_system(self) -> Any:
        """The client."""
        return self._files

    def path(self, path: str) -> str:
        """The path behind the URL's host or archive."""
        if not self._root:  # right under the root of an archive
            return path
        return f"{self._root}/{path}" if path else self._root

    def read(self, path: str, start: int | None, end: int | None) -> bytes:
        """Bytes start to end."""
        with self._errors_of(path):
            return bytes(self._files.cat_file(self.path(path), start=start, end=end))

    def write(self, path: str, parts: Sequence[bytes | memoryview]) -> None:
        """Write a file in one call: an object appears whole, or not at all."""
        self._pipe(path, b"".join(parts))

    def create(self, path: str, data: bytes) -> None:
        """Write a file that is not there yet."""
        self._pipe(path, data, mode="create")

    def _pipe(self, path: str, data: bytes, **options: str) -> None:
        if urlsplit(self._url).scheme in _READ_ONLY:
            raise OSError(errno.EROFS, f"{self._name} can only be read")
        with self._errors_of(path):
            self._files.pipe_file(self.path(path), data, **options)

    def size(self, path: str) -> int:
        """Bytes of a file."""
        return int(self._info(path)["size"])

    def version(self, path: str) -> str | None:
        """Its ETag, where the client knows one."""
        tag = self._info(path).get("ETag")
        return None if tag is None else str(tag)

    def _info(self, path: str) -> dict[str, Any]:
        with self._errors_of(path):
            return dict(self._files.info(self.path(path)))

    def exists(self, path: str) -> bool:
        """Return whether a file or folder exists."""
        with self._errors_of(path):
            return bool(self._files.exists(self.path(path)))

    def is_folder(self, path: str) -> bool:
        """Return whether there is a folder of that name."""
        with self._errors_of(path):
            return bool(self._files.isdir(self.path(path)))

    def entries(self, path: str) -> list[Entry]:
        """List a folder."""
        try:
            with self._errors_of(path):
                listed = self._files.ls(self.path(path), detail=True, refresh=True)
        except FileNotFoundError:
            return []
        found = []
        for entry in listed:
            if str(entry["name"]).strip("/") == self.path(path).strip(
                "/"
            ):  # of a file, itself
                continue
            folder = entry["type"] == "directory"
            found.append(
                Entry(
                    PurePosixPath(entry["name"]).name,
                    None if folder else entry.get("size"),
                    folder,
                )
            )
        return found

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it."""
        with self._errors_of(path):
            self._files.rm(self.path(path), recursive=True)

    @contextmanager
    def _errors_of(self, path: str) -> Iterator[None]:
        """Every error of the client as an OSError, of its kind, and without the URL's secrets."""
        try:
            yield
        except LASTING as error:
            raise type(error)(f"{self._name}/{path}") from None
        except OSError as error:
            raise OSError(self._without_secrets(str(error))) from None
        except RecursionError:  # of the caller, whose stack was full already
            raise
        except (
            Exception
        ) as error:  # clients have errors of their own for a broken connection
            raise OSError(
                self._without_secrets(f"{type(error).__name__}: {error}")
            ) from None

    def _without_secrets(self, text: str) -> str:
        for part in self._url.split("::"):
            pieces = urlsplit(part)
            for secret in (pieces.netloc.rpartition("@")[0], pieces.query):
                text = text.replace(secret, "***") if secret else text
        return text
