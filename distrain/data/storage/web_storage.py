"""A folder on a web server, listed by the server's own index pages.

Apache, nginx, lighttpd, Python and others list a folder as a page of links.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit

from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.fsspec_storage import FsspecStorage
from distrain.data.storage.proxies import must_bypass_proxies
from distrain.data.storage.retry import RefusedError
from distrain.data.storage.store_errors import is_transient_status

_ABSENT_STATUSES = (404, 410)
_SLASH_IN_NAME = "a name with a slash"


def make_client_options(url: str) -> dict[str, Any]:
    """Return options of the HTTP client for a URL: whether it looks for a proxy."""
    return {"client_kwargs": {"trust_env": not must_bypass_proxies(url)}}


class WebStorage(FsspecStorage):
    """Files of a web server through fsspec's HTTP client. They can only be read."""

    def resolve_path(self, path: str) -> str:
        """Return the URL of a file, with its path as the URL must have it."""
        # Names may hold what means something in a URL, and bytes that are no text.
        return super().resolve_path(quote(path, errors="surrogateescape"))

    def read(self, path: str, start: int | None, end: int | None) -> bytes:
        """Return bytes start to end of a file. Raises RefusedError if it sends all."""

        async def check(response: Any) -> None:
            is_whole = response.status == 200
            if is_whole and not _is_within(response.content_length, start, end):
                raise RefusedError(
                    f"the server sends all of {self._describe(path)} where a part is "
                    "asked for: use one that supports range requests, or download the "
                    "file"
                )

        return self._fetch(path, self.resolve_path(path), check, start, end)

    def _fetch(
        self,
        path: str,
        url: str,
        check: Callable[[Any], Awaitable[None]],
        start: int | None = None,
        end: int | None = None,
    ) -> bytes:
        """Return content at a URL, after a check of the response before its body."""
        with self._translate_errors(path):
            data = self._fs.cat_file(url, start=start, end=end, raise_for_status=check)
            return bytes(data)

    def get_size(self, path: str) -> int:
        """Return the size of a file in bytes."""
        size = self._get_info(path)["size"]
        if size is None:
            raise RefusedError(
                f"the server does not say the size of {self._describe(path)}: use one "
                "that sends Content-Length"
            )
        return int(size)

    def exists(self, path: str) -> bool:
        """Return whether the server has a file or folder of that name."""
        try:
            self._get_info(path)
        except FileNotFoundError:
            return False
        return True

    def is_folder(self, path: str) -> bool:
        """Return whether the server lists anything under that name."""
        return bool(self.list_entries(path))

    def list_entries(self, path: str) -> list[DirectoryEntry]:
        """List what the index page of a folder links to; empty if there is no page."""
        page_url = f"{self.resolve_path(path)}/"
        try:
            page = self._fetch(path, page_url, _check_is_page)
            entries = parse_index(page, page_url)
            with self._translate_errors(path):
                # Links from the root of a server to which the request was redirected.
                if not entries:
                    final_url = self._fs.info(page_url)["url"]
                    entries = parse_index(page, final_url)
        except FileNotFoundError:
            return []
        return entries

    @contextmanager
    def _translate_errors(self, path: str) -> Iterator[None]:
        """Translate the client's errors, of which only some may pass."""
        with super()._translate_errors(path):
            try:
                yield
            except RecursionError:
                raise
            except Exception as error:
                # The client takes whatever goes wrong for a missing file.
                cause = error.__cause__ or error
                status = getattr(cause, "status", None)
                if isinstance(status, int):
                    raise self._explain_status(status, path) from None
                if "CERTIFICATE_VERIFY_FAILED" in str(cause):
                    raise RefusedError(
                        f"the certificate of {urlsplit(self._redacted_url).netloc} is "
                        "not trusted: set SSL_CERT_FILE to a file of the authorities "
                        "to trust"
                    ) from None
                # Of errors of connections, some are plain OSErrors, and some come as
                # a missing file.
                is_connection = isinstance(error, FileNotFoundError) or isinstance(
                    cause, OSError
                )
                if cause is not error and is_connection:
                    message = str(cause) or type(cause).__name__
                    raise ConnectionError(message) from None
                raise

    def _explain_status(self, status: int, path: str) -> OSError:
        """Return the error for an HTTP status."""
        url = self._describe(path)
        if status in _ABSENT_STATUSES:
            return FileNotFoundError(url)
        if status == 401:
            return RefusedError(f"the server asks for a password for {url} (HTTP 401)")
        if is_transient_status(status):
            return OSError(f"the server fails to give {url} (HTTP {status})")
        return RefusedError(
            f"the server refuses to give {url} (HTTP {status}): check the URL"
        )

    def _describe(self, path: str) -> str:
        return (
            f"{self._redacted_url.rstrip('/')}/{path}" if path else self._redacted_url
        )


def parse_index(page: bytes, page_url: str) -> list[DirectoryEntry]:
    """Return the files and folders directly under an index page that it links to.

    Links to elsewhere, to parents and to other orders of the page are left out.

    Args:
        page: the page, as HTML.
        page_url: its URL, with a slash at its end.
    """
    parser = _LinkParser()
    # Addresses are ASCII, except where a server does not encode them.
    parser.feed(page.decode("utf-8", "surrogateescape"))
    parser.close()

    base = urlsplit(page_url)
    base_host = base.netloc.rpartition("@")[2]
    base_parts = [_decode(part) for part in base.path.split("/")[:-1]]
    entries: dict[str, DirectoryEntry] = {}
    for link in parser.links:
        try:
            target = urlsplit(urljoin(page_url, link))
        except ValueError:
            continue
        host = target.netloc.rpartition("@")[2]
        if target.scheme not in ("http", "https") or host != base_host or target.query:
            continue

        # Its path must be the page's and one part more.
        is_folder = target.path.endswith("/")
        parts = [_decode(part) for part in target.path.removesuffix("/").split("/")]
        if parts[:-1] != base_parts or parts[-1] in ("", ".", ".."):
            continue
        name = parts[-1]
        if "/" in name:
            entry = DirectoryEntry(
                name, None, False, is_special=True, problem=_SLASH_IN_NAME
            )
        else:
            entry = DirectoryEntry(name, None, is_folder)
        entries.setdefault(name, entry)
    return list(entries.values())


async def _check_is_page(response: Any) -> None:
    """Raise FileNotFoundError for a file where an index page should be."""
    # Some servers give the file at x.tar/ too, which may be large.
    if response.status == 200 and "html" not in response.content_type:
        raise FileNotFoundError


def _is_within(num_bytes: int | None, start: int | None, end: int | None) -> bool:
    """Return whether all bytes of a file lie within start and end."""
    is_to_end = end is None or (num_bytes is not None and num_bytes <= end)
    return not start and is_to_end


def _decode(part: str) -> str:
    return unquote(part, errors="surrogateescape")


class _LinkParser(HTMLParser):
    """Collects the addresses of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take the address of a link."""
        address = dict(attrs).get("href")
        if tag == "a" and address:
            self.links.append(address)
