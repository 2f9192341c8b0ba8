"""A folder on any fsspec file system: a web server, an archive, HDFS, SFTP, others."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.retry import PERMANENT_ERRORS, RefusedError
from distrain.data.storage.url import redact_url

_READ_ONLY_SCHEMES = ("http", "https", "zip")


class FsspecStorage:
    """Files through an fsspec client, whose errors become OSErrors without secrets."""

    local_path: str | None = None

    def __init__(self, url: str, fs: Any, root: str) -> None:
        """Wrap an fsspec client.

        Args:
            url: URL of the folder.
            fs: file system that fsspec makes of the URL.
            root: path that fsspec makes of the URL.
        """
        self._url = url
        self._fs = fs
        self._redacted_url = redact_url(url)
        self._root = root.rstrip("/")

    def to_fsspec(self) -> Any:
        """Return the fsspec client."""
        return self._fs

    def resolve_path(self, path: str) -> str:
        """Return the path after the URL's host or archive."""
        # The root of an archive is the empty path: a slash after it would be too much.
        if not self._root:
            return path
        return f"{self._root}/{path}" if path else self._root

    def read(self, path: str, start: int | None, end: int | None) -> bytes:
        """Return bytes start to end of a file."""
        full_path = self.resolve_path(path)
        with self._translate_errors(path):
            data = self._fs.cat_file(full_path, start=start, end=end)
            return bytes(data)

    def write(self, path: str, parts: Sequence[bytes | memoryview]) -> None:
        """Write a file in one call: an object appears complete, or not at all."""
        self._pipe_file(path, b"".join(parts))

    def create_exclusive(self, path: str, data: bytes) -> None:
        """Write a file that does not exist yet. Raises FileExistsError."""
        self._pipe_file(path, data, mode="create")

    def _pipe_file(self, path: str, data: bytes, **options: str) -> None:
        scheme = urlsplit(self._url).scheme
        if scheme in _READ_ONLY_SCHEMES:
            raise OSError(errno.EROFS, f"{self._redacted_url} is read-only")
        full_path = self.resolve_path(path)
        with self._translate_errors(path):
            self._fs.pipe_file(full_path, data, **options)

    def get_size(self, path: str) -> int:
        """Return the size of a file in bytes."""
        info = self._get_info(path)
        return int(info["size"])

    def get_etag(self, path: str) -> str | None:
        """Return a file's ETag, if the client knows one."""
        info = self._get_info(path)
        etag = info.get("ETag")
        return None if etag is None else str(etag)

    def _get_info(self, path: str) -> dict[str, Any]:
        full_path = self.resolve_path(path)
        with self._translate_errors(path):
            return dict(self._fs.info(full_path))

    def exists(self, path: str) -> bool:
        """Return whether a file or folder exists."""
        full_path = self.resolve_path(path)
        with self._translate_errors(path):
            return bool(self._fs.exists(full_path))

    def is_folder(self, path: str) -> bool:
        """Return whether a folder of that name exists."""
        full_path = self.resolve_path(path)
        with self._translate_errors(path):
            return bool(self._fs.isdir(full_path))

    def list_entries(self, path: str) -> list[DirectoryEntry]:
        """List a folder; empty if it does not exist."""
        full_path = self.resolve_path(path)
        try:
            # `refresh`, because clients cache listings, and other processes add files.
            with self._translate_errors(path):
                infos = self._fs.ls(full_path, detail=True, refresh=True)
        except FileNotFoundError:
            return []
        entries = []
        for info in infos:
            entry_path = str(info["name"])
            # Listing a file gives the file itself, which is not an entry of a folder.
            if entry_path.strip("/") == full_path.strip("/"):
                continue
            name = PurePosixPath(entry_path).name
            is_folder = info["type"] == "directory"
            size = None if is_folder else info.get("size")
            entries.append(DirectoryEntry(name, size, is_folder))
        return entries

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with everything in it."""
        full_path = self.resolve_path(path)
        with self._translate_errors(path):
            self._fs.rm(full_path, recursive=True)

    @contextmanager
    def _translate_errors(self, path: str) -> Iterator[None]:
        """Translate the client's errors to OSErrors, with the URL's secrets removed."""
        # `from None` everywhere: the client's own message may hold the secrets.
        try:
            yield
        except RefusedError:
            # A sentence already, without secrets.
            raise
        except PERMANENT_ERRORS as error:
            raise type(error)(f"{self._redacted_url}/{path}") from None
        except ConnectionError as error:
            raise ConnectionError(self._redact_secrets(str(error))) from None
        except OSError as error:
            raise OSError(self._redact_secrets(str(error))) from None
        except RecursionError:
            # The caller's stack was nearly full: that is not an error of storage.
            raise
        except Exception as error:
            # Clients have their own exceptions, for instance for a broken connection.
            message = f"{type(error).__name__}: {error}"
            raise OSError(self._redact_secrets(message)) from None

    def _redact_secrets(self, text: str) -> str:
        for part in self._url.split("::"):
            parsed = urlsplit(part)
            user_and_password = parsed.netloc.rpartition("@")[0]
            for secret in (user_and_password, parsed.query):
                if secret:
                    text = text.replace(secret, "***")
        return text
