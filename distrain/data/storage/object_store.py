"""Objects in a bucket (S3, GCS, Azure), through obstore.

obstore takes half the CPU time of other clients, and resumes bodies that break off.
Credentials come from the clouds' standard chains: environment, instance or pod role,
and for S3 the profiles of boto3 if that is installed.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from distrain.data.storage.aws_profile import (
    ProfileCredentials,
    read_aws_profile,
    read_endpoint_variable,
)
from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.proxies import must_bypass_proxies
from distrain.data.storage.retry import RefusedError
from distrain.data.storage.s3_listing import ODD_KEY, list_with_botocore
from distrain.data.storage.store_errors import (
    StoreRequest,
    summarize_error,
    translate_store_error,
)
from distrain.errors import UserError

EXTRA_BY_SCHEME = {"s3": "s3", "gs": "gcs", "az": "azure"}
"""URL schemes of object stores, and the extra of distrain that each needs."""

# `read_timeout` ends a body that stalls; a slow one may take up to an hour.
_CLIENT_OPTIONS = {"connect_timeout": "5s", "read_timeout": "20s", "timeout": "1h"}
# Few and short: the caller counts the failures, and retries for much longer.
_RETRY_OPTIONS = {
    "max_retries": 2,
    "retry_timeout": timedelta(seconds=30),
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=2),
        "base": 2,
    },
}


class ObjectStorage:
    """Objects under a prefix of a bucket, in place of files in a folder."""

    local_path: str | None = None

    def __init__(self, url: str, scheme: str) -> None:
        """Open the bucket of a URL, without a request to it.

        Raises:
            UserError: obstore is not installed, or the URL is not valid.
        """
        # obstore is an optional package, so it is imported only for a bucket.
        try:
            import obstore
        except ImportError:
            extra = EXTRA_BY_SCHEME[scheme]
            raise UserError(
                f"{scheme}:// needs obstore: pip install 'distrain[{extra}]'"
            ) from None
        self._obstore = obstore
        self._scheme = scheme

        # Split scheme://bucket/prefix.
        url_parts = url.split("/")
        self._bucket_url = "/".join(url_parts[:3])
        self._root_path = "/".join(url_parts[2:]).rstrip("/")
        self._key_prefix = self._root_path.partition("/")[2]

        # Create the client.
        self._store_options: dict[str, Any] = {
            "client_options": {**_CLIENT_OPTIONS, "allow_http": True},
            "retry_config": _RETRY_OPTIONS,
        }
        self._profile: ProfileCredentials | None = None
        if scheme == "s3":
            settings, self._profile = read_aws_profile()
            endpoint = read_endpoint_variable() or settings.get("endpoint")
            self._store_options["config"] = settings
            self._store_options["client_options"].update(_choose_proxy(endpoint))
            self._store_options["credential_provider"] = self._profile
        try:
            self._client = obstore.store.from_url(
                self._bucket_url, **self._store_options
            )
        except Exception as error:
            # obstore has one exception for each way in which a URL can be wrong.
            raise UserError(
                f"cannot open {self._bucket_url}: {summarize_error(error)}"
            ) from None

    def to_fsspec(self) -> Any:
        """Return fsspec's form of the same client."""
        from obstore.fsspec import FsspecStore

        # Any, because its overloads accept the scheme only as a literal.
        store_class: Any = FsspecStore
        return store_class(self._scheme, **self._store_options)

    def resolve_path(self, path: str) -> str:
        """Return bucket and key of an object."""
        return f"{self._root_path}/{path}" if path else self._root_path

    def _build_key(self, path: str) -> str:
        return f"{self._key_prefix}/{path}".strip("/") if path else self._key_prefix

    def read(self, path: str, start: int | None, end: int | None) -> memoryview:
        """Return bytes start to end of an object, as a view of the client's buffer."""
        key = self._build_key(path)
        start = start or 0
        try:
            if end is not None:
                data = self._obstore.get_range(self._client, key, start=start, end=end)
                return memoryview(data)
            options: Any = {"range": {"offset": start}} if start else None
            response = self._obstore.get(self._client, key, options=options)
            return memoryview(response.bytes())
        except Exception as error:
            raise self._to_os_error(error, path, "read") from error

    def write(self, path: str, parts: Sequence[bytes | memoryview]) -> None:
        """Write an object, complete or not at all."""
        self._put_object(path, b"".join(parts), "overwrite")

    def create_exclusive(self, path: str, data: bytes) -> None:
        """Write an object that does not exist yet, by a conditional put."""
        self._put_object(path, data, "create")

    def _put_object(
        self,
        path: str,
        data: bytes,
        mode: Literal["create", "overwrite"],
    ) -> None:
        key = self._build_key(path)
        try:
            self._obstore.put(self._client, key, data, mode=mode)
        except Exception as error:
            action = "create" if mode == "create" else "write"
            raise self._to_os_error(error, path, action) from error

    def get_size(self, path: str) -> int:
        """Return the size of an object in bytes."""
        head = self._head_object(path)
        return int(head["size"])

    def get_etag(self, path: str) -> str | None:
        """Return an object's ETag, if its store has one."""
        head = self._head_object(path)
        etag = head["e_tag"]
        return None if etag is None else str(etag)

    def _head_object(self, path: str) -> Any:
        key = self._build_key(path)
        try:
            return self._obstore.head(self._client, key)
        except Exception as error:
            os_error = self._to_os_error(error, path, "read")
            if isinstance(os_error, RefusedError):
                # The answer to a HEAD has no body that says why: ask by a GET.
                self.read(path, 0, 1)
            raise os_error from error

    def exists(self, path: str) -> bool:
        """Return whether an object of that name exists, or any under that prefix."""
        try:
            self.get_size(path)
        except FileNotFoundError:
            return self.is_folder(path)
        return True

    def is_folder(self, path: str) -> bool:
        """Return whether any object exists under that prefix, markers included."""
        return bool(self._list_all(path))

    def list_entries(self, path: str) -> list[DirectoryEntry]:
        """List the objects and prefixes directly under a prefix; prefixes are folders.

        Empty if there are none. Markers of folders are left out.
        """
        entries = self._list_all(path)
        folder_names = {entry.name for entry in entries if entry.is_folder}
        return [entry for entry in entries if not _is_marker(entry, folder_names)]

    def _list_all(self, path: str) -> list[DirectoryEntry]:
        """List a prefix, markers of folders included: that of itself has no name."""
        key = self._build_key(path)
        prefix = f"{key}/" if key else ""
        try:
            listing = self._obstore.list_with_delimiter(self._client, prefix or None)
        except Exception as error:
            # By name, because obstore and its exceptions may not be installed.
            if self._scheme == "s3" and type(error).__name__ == "InvalidPathError":
                bucket = urlsplit(self._bucket_url).netloc
                entries = list_with_botocore(bucket, prefix)
                if entries is not None:
                    return entries
            raise self._to_os_error(error, path, "list") from error
        folders = [_make_folder_entry(str(key)) for key in listing["common_prefixes"]]
        # obstore drops the last slash of a marker: that of the prefix itself remains.
        files = [
            DirectoryEntry(str(item["path"])[len(prefix) :], int(item["size"]), False)
            for item in listing["objects"]
        ]
        return folders + files

    def remove(self, path: str) -> None:
        """Remove an object, or all objects under a prefix."""
        key = self._build_key(path)
        try:
            # If there is nothing under the prefix, the path names an object.
            keys = list[str]()
            for chunk in self._obstore.list(self._client, f"{key}/"):
                keys.extend(entry["path"] for entry in chunk)
        except Exception as error:
            raise self._to_os_error(error, path, "list") from error
        for key_to_remove in keys or [key]:
            # obstore gives the marker of the folder the name of an object beside it.
            if keys and key_to_remove == key:
                continue
            try:
                self._obstore.delete(self._client, key_to_remove)
            except Exception as error:
                raise self._to_os_error(error, path, "remove") from error

    def _to_os_error(self, error: Exception, path: str, action: str) -> OSError:
        """Return the OSError for an exception of obstore."""
        if self._profile is not None and self._profile.failure is not None:
            return self._profile.failure
        key = self._build_key(path)
        object_url = f"{self._bucket_url}/{key}"
        request = StoreRequest(action, self._scheme, self._bucket_url, object_url)
        return translate_store_error(error, request)


def _choose_proxy(endpoint: str | None) -> dict[str, str]:
    """Return client options for an endpoint that is not behind the proxy, else none."""
    if endpoint is None or not must_bypass_proxies(endpoint):
        return {}
    host = urlsplit(endpoint).hostname or ""
    # The client only excludes hosts from a proxy that is named.
    return {"proxy_url": next(iter(getproxies().values())), "proxy_excludes": host}


def _make_folder_entry(folder_key: str) -> DirectoryEntry:
    name = folder_key.rstrip("/").rpartition("/")[2]
    # Of keys that start with a slash.
    if not name:
        return DirectoryEntry("/", None, False, is_special=True, problem=ODD_KEY)
    return DirectoryEntry(name, None, True)


def _is_marker(entry: DirectoryEntry, folder_names: set[str]) -> bool:
    """Return whether an object only says that a folder exists.

    Consoles, mounts and Hadoop write them: an empty object with the folder's name,
    before a slash, as it is, or before `_$folder$`.
    """
    if entry.is_folder or entry.is_special:
        return False
    is_named_like_folder = entry.name in folder_names
    is_of_hadoop = entry.name.endswith("_$folder$")
    return not entry.name or (
        entry.size == 0 and (is_named_like_folder or is_of_hadoop)
    )
