"""URLs of data sets, runs and servers."""

import re
from urllib.parse import urlsplit, urlunsplit

_SECRET_PARAMETER = re.compile(
    r"(?i)(signature|token|secret|sig|password|passwd|pwd|credential)="
)


def forbid_url_secrets(url: str | None) -> str | None:
    """Refuse a URL with a password or a signature: it would be saved with the config, and shown."""
    for part in url.split("::") if url is not None and "://" in url else ():
        parts = urlsplit(part)
        if parts.password is not None or _SECRET_PARAMETER.search(parts.query):
            raise ValueError(
                "the URL holds a secret, which would be saved and shown: "
                "give credentials in the environment, a profile or a role"
            )
    return url


def redact_url(url: str) -> str:
    """A URL, or a chain of them, without user, password and query."""
    shown = []
    for part in url.split("::"):
        pieces = urlsplit(part)
        secret = pieces._replace(netloc=pieces.netloc.rpartition("@")[2], query="")
        shown.append(urlunsplit(secret) if "://" in part else part)
    return "::".join(shown)
