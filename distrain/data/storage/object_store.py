"""Objects in a bucket (S3, GCS, Azure), through obstore.

obstore takes half the CPU time of other clients, and resumes bodies that break off.
Credentials come from the clouds' standard chains: environment, instance or pod role,
and for S3 the profiles of boto3 if that is installed.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from distrain.data.storage.backend import DirectoryEntry
from distrain.errors import UserError

CREDENTIALS_BY_SCHEME = {
    "s3": (
        "the AWS chain: AWS_ACCESS_KEY_ID, AWS_PROFILE or ~/.aws (with boto3), "
        "the role of a pod or an instance"
    ),
    "gs": (
        "Google's chain: GOOGLE_APPLICATION_CREDENTIALS, gcloud's credentials, "
        "the service account of an instance"
    ),
    "az": (
        "Azure's chain: AZURE_STORAGE_ACCOUNT_NAME with a key, token or client, "
        "a managed identity"
    ),
}
"""URL schemes of object stores, and where the credentials of each are looked for."""

_EXTRA_BY_SCHEME = {"s3": "s3", "gs": "gcs", "az": "azure"}

# Servers of an instance's or a pod's role, the last that the chains ask.
_ROLE_SERVERS = ("169.254.169.254", "169.254.170.", "metadata.google.internal")

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
            extra = _EXTRA_BY_SCHEME[scheme]
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
        if scheme == "s3" and (provider := _find_boto3_credentials()) is not None:
            self._store_options["credential_provider"] = provider
        try:
            self._client = obstore.store.from_url(
                self._bucket_url, **self._store_options
            )
        except Exception as error:
            # obstore has one exception for each way in which a URL can be wrong.
            raise UserError(
                f"cannot open {self._bucket_url}: {_summarize_error(error)}"
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
            raise self._to_os_error(error, path) from error

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
            raise self._to_os_error(error, path) from error

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
            raise self._to_os_error(error, path) from error

    def exists(self, path: str) -> bool:
        """Return whether an object of that name exists, or any under that prefix."""
        try:
            self.get_size(path)
        except FileNotFoundError:
            return self.is_folder(path)
        return True

    def is_folder(self, path: str) -> bool:
        """Return whether any object exists under that prefix."""
        return bool(self.list_entries(path))

    def list_entries(self, path: str) -> list[DirectoryEntry]:
        """List the objects and prefixes directly under a prefix; prefixes are folders.

        Empty if there are none.
        """
        key = self._build_key(path)
        try:
            listing = self._obstore.list_with_delimiter(
                self._client, f"{key}/" if key else None
            )
        except Exception as error:
            raise self._to_os_error(error, path) from error
        entries = []
        for prefix in listing["common_prefixes"]:
            name = _get_last_part(str(prefix).rstrip("/"))
            entries.append(DirectoryEntry(name, None, True))
        for item in listing["objects"]:
            name = _get_last_part(str(item["path"]))
            size = int(item["size"])
            entries.append(DirectoryEntry(name, size, False))
        return entries

    def remove(self, path: str) -> None:
        """Remove an object, or all objects under a prefix."""
        key = self._build_key(path)
        try:
            # If there is nothing under the prefix, the path names an object.
            keys = list[str]()
            for chunk in self._obstore.list(self._client, f"{key}/"):
                keys.extend(entry["path"] for entry in chunk)
            for key_to_delete in keys or [key]:
                self._obstore.delete(self._client, key_to_delete)
        except Exception as error:
            raise self._to_os_error(error, path) from error

    def _to_os_error(self, error: Exception, path: str) -> OSError:
        object_url = f"{self._bucket_url}/{self._build_key(path)}"
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(object_url)
        # By name, because obstore and its exceptions may not be installed.
        error_name = type(error).__name__
        if error_name == "AlreadyExistsError":
            return FileExistsError(object_url)
        if error_name in ("PermissionDeniedError", "UnauthenticatedError"):
            return PermissionError(
                f"the store denies access to {object_url}: check the credentials, "
                f"which come from {CREDENTIALS_BY_SCHEME[self._scheme]}"
            )
        reason = _summarize_error(error)
        # Perhaps only for now, so that the caller may try again.
        if any(server in reason for server in _ROLE_SERVERS):
            return OSError(
                f"no credentials for {self._bucket_url}, which come from "
                f"{CREDENTIALS_BY_SCHEME[self._scheme]} ({reason})"
            )
        return OSError(reason)


def _get_last_part(key: str) -> str:
    return key.rpartition("/")[2]


def _find_boto3_credentials() -> Any:
    """Return boto3's credential chain, or None to use obstore's own.

    boto3's is used if it is installed and a profile or a credentials file exists.

    Raises:
        UserError: the profile is missing or cannot be read.
    """
    if (
        "AWS_PROFILE" not in os.environ
        and not Path("~/.aws/credentials").expanduser().exists()
    ):
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return None
    try:
        return Boto3CredentialProvider()
    except ValueError:
        # There are profiles, but none of them is in use here.
        return None
    except Exception as error:
        # botocore's own exceptions, for a profile that is missing or unreadable.
        raise UserError(
            f"the AWS profile cannot be used: {_summarize_error(error)}"
        ) from None


def _summarize_error(error: BaseException) -> str:
    """Return the first line of an error: the others may hold signed URLs."""
    lines = (line.strip() for line in str(error).splitlines())
    first_line = next((line for line in lines if line), type(error).__name__)
    return first_line[:300]
