"""URLs of data sets, runs and servers."""

import re
from urllib.parse import urlsplit

_SECRET = re.compile(r"(?i)(signature|token|secret|sig|password|passwd|pwd|credential)=")


def without_secret(url: str | None) -> str | None:
    """Refuse a URL with a password or a signature: it would be saved with the config, and shown."""
    for part in url.split("::") if url is not None and "://" in url else ():
        parts = urlsplit(part)
        if parts.password is not None or _SECRET.search(parts.query):
            raise ValueError(
                "the URL holds a secret, which would be saved and shown: "
                "give credentials in the environment, a profile or a role"
            )
    return url
