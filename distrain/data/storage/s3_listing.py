"""Listing of a prefix in S3 that holds keys which obstore cannot name.

obstore takes keys for paths, and fails to list a prefix if one of them has an empty
part, say. botocore lists them all, so that the others can be read.
"""

import os
import re
from typing import Any

from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.store_errors import summarize_error

ODD_KEY = "a key with an empty part, a part . or .., or a control character"
"""What a key is that obstore cannot name."""
_TIMEOUT_SECONDS = 20
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")


def list_with_botocore(bucket: str, prefix: str) -> list[DirectoryEntry] | None:
    """List what lies directly under a prefix, keys that cannot be read as special.

    Args:
        bucket: name of the bucket.
        prefix: with its last slash; "" for the bucket.

    Returns:
        The entries, markers of folders included; None if botocore is not installed.

    Raises:
        OSError: the bucket cannot be listed.
    """
    try:
        import botocore.exceptions
    except ImportError:
        return None
    entries: list[DirectoryEntry] = []
    try:
        pages = _create_client().get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=prefix, Delimiter="/"):
            folders = page.get("CommonPrefixes", [])
            entries += [_make_entry(found["Prefix"], prefix, None) for found in folders]
            items = page.get("Contents", [])
            entries += [
                _make_entry(item["Key"], prefix, item["Size"]) for item in items
            ]
    except (
        botocore.exceptions.BotoCoreError,
        botocore.exceptions.ClientError,
    ) as error:
        raise OSError(summarize_error(error)) from None
    return entries


def _create_client() -> Any:
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config

    skip_signature = os.environ.get("AWS_SKIP_SIGNATURE", "").lower()
    config = Config(
        s3={"addressing_style": "path"},
        signature_version=UNSIGNED if skip_signature in ("1", "true") else None,
        connect_timeout=_TIMEOUT_SECONDS,
        read_timeout=_TIMEOUT_SECONDS,
    )
    session = botocore.session.Session()
    region = os.environ.get("AWS_REGION") or session.get_config_variable("region")
    return session.create_client(
        "s3",
        region_name=region or "us-east-1",
        # botocore reads the other variables itself, and the profile's endpoint.
        endpoint_url=os.environ.get("AWS_ENDPOINT"),
        config=config,
    )


def _make_entry(key: str, prefix: str, size: int | None) -> DirectoryEntry:
    """Return the entry of a key, or of the prefix of keys if it has no size."""
    name = key.removeprefix(prefix)
    is_folder = size is None
    plain_name = name.removesuffix("/")
    is_readable = plain_name not in ("", ".", "..")
    if is_readable and _CONTROL_CHARACTER.search(plain_name) is None:
        return DirectoryEntry(plain_name, size, is_folder)
    # The marker of the listed folder itself has no name: not an entry.
    if not name:
        return DirectoryEntry("", size, False)
    return DirectoryEntry(name, None, False, is_special=True, problem=ODD_KEY)
