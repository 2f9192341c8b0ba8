"""URLs of data sets, runs and servers."""

import os
import re
from typing import overload
from urllib.parse import urlsplit, urlunsplit

from distrain.errors import UserError

_SECRET_PARAMETER = re.compile(
    r"(?i)(signature|token|secret|sig|password|passwd|pwd|credential)="
)


@overload
def expand_home(url: str) -> str: ...
@overload
def expand_home(url: None) -> None: ...
def expand_home(url: str | None) -> str | None:
    """Return a path with its leading ~ or ~user replaced by that home directory.

    It is the home of this machine, so that the path means the same on others. A URL of
    another kind, or None, is returned as it is. A folder that is named ~ is ./~.

    Raises:
        UserError: the home directory is not known.
    """
    scheme = "file://" if url is not None and url.startswith("file://") else ""
    if url is None or not url.removeprefix(scheme).startswith("~"):
        return url
    path = url.removeprefix(scheme)
    expanded = os.path.expanduser(path)
    # A name that is no user's is left as it is: a file may begin with ~.
    if expanded == path and path.split("/")[0] == "~":
        raise UserError(
            f"{path} is in your home directory, which is not known: set HOME, or write "
            "the path without ~"
        )
    return scheme + expanded


def forbid_url_secrets(url: str | None) -> str | None:
    """Return a URL unchanged, or raise ValueError if it holds a secret.

    A password or a signature would be saved with the config, and displayed.
    """
    if url is None or "://" not in url:
        return url
    # fsspec chains URLs with "::", as in zip://::https://host/file.zip.
    for part in url.split("::"):
        parsed = urlsplit(part)
        if parsed.password is not None or _SECRET_PARAMETER.search(parsed.query):
            raise ValueError(
                "the URL holds a secret, which would be saved and displayed: "
                "give credentials in the environment, a profile or a role"
            )
    return url


def redact_url(url: str) -> str:
    """Return a URL, or a chain of them, without user, password and query."""
    shown = []
    for part in url.split("::"):
        parsed = urlsplit(part)
        host = parsed.netloc.rpartition("@")[2]
        redacted = urlunsplit(parsed._replace(netloc=host, query=""))
        # A path without a scheme stays as it is: "?" and "@" are legal in file names.
        # So does a URL without either, since urlunsplit makes zip: of zip://.
        has_secret = host != parsed.netloc or bool(parsed.query)
        shown.append(redacted if "://" in part and has_secret else part)
    return "::".join(shown)


def join_url(url: str, path: str) -> str:
    """Return the URL of a file or folder in the folder of a URL.

    Of a chain of URLs, such as zip://train::photos.zip, the first names the folder.
    """
    first, chain, rest = url.partition("::")
    # The root of an archive is zip://, to which no slash is added.
    separator = "" if first.endswith("/") else "/"
    return f"{first}{separator}{path}{chain}{rest}"
