"""Objects in a bucket (S3, GCS, Azure), through obstore: half the CPU time of other clients, and it resumes bodies.

Credentials come from the ecosystem's own chains: environment, instance or pod role, and for S3 the profiles of boto3
where that is installed.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from distrain.data.storage.backend import DirectoryEntry
from distrain.errors import UserError

CREDENTIALS_BY_SCHEME = {
    "s3": "the AWS chain: AWS_ACCESS_KEY_ID, AWS_PROFILE or ~/.aws (with boto3), a pod's or an instance's role",
    "gs": "Google's chain: GOOGLE_APPLICATION_CREDENTIALS, gcloud's own, an instance's service account",
    "az": "Azure's chain: AZURE_STORAGE_ACCOUNT_NAME with a key, token or client, a managed identity",
}
"""What is an object store, by URL scheme, and where its credentials are looked for."""

# A stalled body is given up after `read_timeout`; a slow one may take as long as it takes.
_CLIENT_OPTIONS = {"connect_timeout": "5s", "read_timeout": "20s", "timeout": "1h"}
# Short: whoever reads counts the failures, and tries again for much longer.
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
    """The objects under a prefix of a bucket, which take the place of a folder's files."""

    local_path: str | None = None

    def __init__(self, url: str, scheme: str) -> None:
        """Open the bucket of a URL; nothing is asked of the network.

        Raises:
            UserError: obstore is not installed, or the URL is none.
        """
        try:
            import obstore
        except ImportError:
            raise UserError(
                f"{scheme}:// needs obstore: pip install 'distrain[{_EXTRA_BY_SCHEME[scheme]}]'"
            ) from None
        self._obstore, self._scheme = obstore, scheme
        self._store_options: dict[str, Any] = {
            "client_options": {**_CLIENT_OPTIONS, "allow_http": True},
            "retry_config": _RETRY_OPTIONS,
        }
        if scheme == "s3" and (provider := _find_boto3_credentials()) is not None:
            self._store_options["credential_provider"] = provider
        self._bucket_url = bucket = "/".join(url.split("/")[:3])
        self._root_path = "/".join(url.split("/")[2:]).rstrip("/")
        self._key_prefix = self._root_path.partition("/")[2]
        try:
            self._client = obstore.store.from_url(bucket, **self._store_options)
        except (
            Exception
        ) as error:  # obstore's own kinds, one for each way in which a URL can be wrong
            raise UserError(
                f"cannot open {bucket}: {_summarize_error(error)}"
            ) from None

    def to_fsspec(self) -> Any:
        """fsspec's form of the same client."""
        from obstore.fsspec import FsspecStore

        kind: Any = FsspecStore  # its overloads want the scheme as a literal
        return kind(self._scheme, **self._store_options)

    def resolve_path(self, path: str) -> str:
        """Bucket and key."""
        return f"{self._root_path}/{path}" if path else self._root_path

    def _build_key(self, path: str) -> str:
        return f"{self._key_prefix}/{path}".strip("/") if path else self._key_prefix

    def read(self, path: str, start: int | None, end: int | None) -> memoryview:
        """Bytes start to end of an object, or all of it, where the client has them."""
        key, start = self._build_key(path), start or 0
        try:
            if end is not None:
                return memoryview(
                    self._obstore.get_range(self._client, key, start=start, end=end)
                )
            options: Any = {"range": {"offset": start}} if start else None
            return memoryview(
                self._obstore.get(self._client, key, options=options).bytes()
            )
        except Exception as error:
            raise self._to_os_error(error, path) from error

    def write(self, path: str, parts: Sequence[bytes | memoryview]) -> None:
        """Write an object, whole or not at all."""
        self._put_object(path, b"".join(parts), "overwrite")

    def create_exclusive(self, path: str, data: bytes) -> None:
        """Write an object that is not there yet, by a conditional put."""
        self._put_object(path, data, "create")

    def _put_object(
        self, path: str, data: bytes, mode: Literal["create", "overwrite"]
    ) -> None:
        try:
            self._obstore.put(self._client, self._build_key(path), data, mode=mode)
        except Exception as error:
            raise self._to_os_error(error, path) from error

    def get_size(self, path: str) -> int:
        """Bytes of an object."""
        return int(self._head_object(path)["size"])

    def get_etag(self, path: str) -> str | None:
        """Its ETag."""
        tag = self._head_object(path)["e_tag"]
        return None if tag is None else str(tag)

    def _head_object(self, path: str) -> Any:
        try:
            return self._obstore.head(self._client, self._build_key(path))
        except Exception as error:
            raise self._to_os_error(error, path) from error

    def exists(self, path: str) -> bool:
        """Return whether there is an object of that name, or one under that prefix."""
        try:
            self.get_size(path)
        except FileNotFoundError:
            return self.is_folder(path)
        return True

    def is_folder(self, path: str) -> bool:
        """Return whether there is an object under that prefix."""
        return bool(self.list_entries(path))

    def list_entries(self, path: str) -> list[DirectoryEntry]:
        """List the objects and prefixes directly under a prefix; prefixes are folders."""
        key = self._build_key(path)
        try:
            found = self._obstore.list_with_delimiter(
                self._client, f"{key}/" if key else None
            )
        except Exception as error:
            raise self._to_os_error(error, path) from error
        prefixes = [
            DirectoryEntry(str(prefix).rstrip("/").rpartition("/")[2], None, True)
            for prefix in found["common_prefixes"]
        ]
        objects = [
            DirectoryEntry(str(at["path"]).rpartition("/")[2], int(at["size"]), False)
            for at in found["objects"]
        ]
        return [*prefixes, *objects]

    def remove(self, path: str) -> None:
        """Remove an object, or all objects under a prefix."""
        key = self._build_key(path)
        try:
            under = [
                entry["path"]
                for chunk in self._obstore.list(self._client, f"{key}/")
                for entry in chunk
            ]
            for one in under or [key]:
                self._obstore.delete(self._client, one)
        except Exception as error:
            raise self._to_os_error(error, path) from error

    def _to_os_error(self, error: Exception, path: str) -> OSError:
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(f"{self._bucket_url}/{self._build_key(path)}")
        kind = type(error).__name__
        if kind == "AlreadyExistsError":
            return FileExistsError(f"{self._bucket_url}/{self._build_key(path)}")
        if kind in ("PermissionDeniedError", "UnauthenticatedError"):
            where = f"{self._bucket_url}/{self._build_key(path)}"
            return PermissionError(
                f"the store refuses {where}; credentials were looked for in {CREDENTIALS_BY_SCHEME[self._scheme]}"
            )
        return OSError(_summarize_error(error))


_EXTRA_BY_SCHEME = {"s3": "s3", "gs": "gcs", "az": "azure"}


def _find_boto3_credentials() -> Any:
    """boto3's chain, where a profile is in use and boto3 is installed; None: obstore's own."""
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
    except ValueError:  # there are profiles, but none that is in use here
        return None
    except Exception as error:  # botocore's own kinds, for a profile that is not there or cannot be read
        raise UserError(
            f"the AWS profile cannot be used: {_summarize_error(error)}"
        ) from None


def _summarize_error(error: BaseException) -> str:
    """The first line of an error: what follows may hold signed addresses."""
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()),
        type(error).__name__,
    )[:300]
