"""A folder on any file system of fsspec's: a web server, an archive, HDFS, SFTP and the rest."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.retry import PERMANENT_ERRORS
from distrain.data.storage.url import redact_url

_READ_ONLY_SCHEMES = ("http", "https", "zip")


class FsspecStorage:
    """Files by an fsspec client, whose errors become OSErrors without the URL's secrets."""

    local_path: str | None = None

    def __init__(self, url: str, fs: Any, root: str) -> None:
        """Take the URL, and the file system and the path that fsspec makes of it."""
        self._url, self._fs = url, fs
        self._redacted_url = redact_url(url)
        self._root = root.rstrip("/")

    def to_fsspec(self) -> Any:
        """The client."""
        return self._fs

    def resolve_path(self, path: str) -> str:
        """The path behind the URL's host or archive."""
        if not self._root:  # right under the root of an archive
            return path
        return f"{self._root}/{path}" if path else self._root

    def read(self, path: str, start: int | None, end: int | None) -> bytes:
        """Bytes start to end."""
        with self._translate_errors(path):
            return bytes(
                self._fs.cat_file(self.resolve_path(path), start=start, end=end)
            )

    def write(self, path: str, parts: Sequence[bytes | memoryview]) -> None:
        """Write a file in one call: an object appears whole, or not at all."""
        self._pipe_file(path, b"".join(parts))

    def create_exclusive(self, path: str, data: bytes) -> None:
        """Write a file that is not there yet."""
        self._pipe_file(path, data, mode="create")

    def _pipe_file(self, path: str, data: bytes, **options: str) -> None:
        if urlsplit(self._url).scheme in _READ_ONLY_SCHEMES:
            raise OSError(errno.EROFS, f"{self._redacted_url} can only be read")
        with self._translate_errors(path):
            self._fs.pipe_file(self.resolve_path(path), data, **options)

    def get_size(self, path: str) -> int:
        """Bytes of a file."""
        return int(self._get_info(path)["size"])

    def get_etag(self, path: str) -> str | None:
        """Its ETag, where the client knows one."""
        tag = self._get_info(path).get("ETag")
        return None if tag is None else str(tag)

    def _get_info(self, path: str) -> dict[str, Any]:
        with self._translate_errors(path):
            return dict(self._fs.info(self.resolve_path(path)))

    def exists(self, path: str) -> bool:
        """Return whether a file or folder exists."""
        with self._translate_errors(path):
            return bool(self._fs.exists(self.resolve_path(path)))

    def is_folder(self, path: str) -> bool:
        """Return whether there is a folder of that name."""
        with self._translate_errors(path):
            return bool(self._fs.isdir(self.resolve_path(path)))

    def list_entries(self, path: str) -> list[DirectoryEntry]:
        """List a folder."""
        try:
            with self._translate_errors(path):
                listed = self._fs.ls(self.resolve_path(path), detail=True, refresh=True)
        except FileNotFoundError:
            return []
        found = []
        for entry in listed:
            if str(entry["name"]).strip("/") == self.resolve_path(path).strip(
                "/"
            ):  # of a file, itself
                continue
            folder = entry["type"] == "directory"
            found.append(
                DirectoryEntry(
                    PurePosixPath(entry["name"]).name,
                    None if folder else entry.get("size"),
                    folder,
                )
            )
        return found

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it."""
        with self._translate_errors(path):
            self._fs.rm(self.resolve_path(path), recursive=True)

    @contextmanager
    def _translate_errors(self, path: str) -> Iterator[None]:
        """Every error of the client as an OSError, of its kind, and without the URL's secrets."""
        try:
            yield
        except PERMANENT_ERRORS as error:
            raise type(error)(f"{self._redacted_url}/{path}") from None
        except OSError as error:
            raise OSError(self._redact_secrets(str(error))) from None
        except RecursionError:  # of the caller, whose stack was full already
            raise
        except (
            Exception
        ) as error:  # clients have errors of their own for a broken connection
            raise OSError(
                self._redact_secrets(f"{type(error).__name__}: {error}")
            ) from None

    def _redact_secrets(self, text: str) -> str:
        for part in self._url.split("::"):
            pieces = urlsplit(part)
            for secret in (pieces.netloc.rpartition("@")[0], pieces.query):
                text = text.replace(secret, "***") if secret else text
        return text
