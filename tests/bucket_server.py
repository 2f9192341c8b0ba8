"""A small S3 server: path-style, ListObjectsV2 with pages, ranges, and answers that a test sets."""

import hashlib
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from small_server import SmallHandler, SmallServer, serve

PAGE = 3


class Request(NamedTuple):
    method: str
    path: str
    """The path with its query, as sent."""
    access_key: str
    region: str
    action: str
    """list, read or write."""


class Answer(NamedTuple):
    status: int
    code: str = ""
    """Error code of the body; none: the body is empty."""
    headers: tuple[tuple[str, str], ...] = ()
    more: str = ""
    """More XML in the body."""


class BucketServer(SmallServer):
    """One bucket of any name; `refuse` gives the answer in place of the true one."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.refuse: Callable[[Request], Answer | None] = lambda _: None


def serve_bucket() -> AbstractContextManager[BucketServer]:
    return serve(BucketServer())


class _Handler(SmallHandler):
    server: BucketServer

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        key = unquote(url.path).lstrip("/").partition("/")[2]
        query = parse_qs(url.query, keep_blank_values=True)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        signed = re.search(
            r"Credential=([^/]+)/\d+/([^/]*)/", self.headers.get("Authorization", "")
        )
        action = "read" if self.command in ("GET", "HEAD") else "write"
        if "list-type" in query:
            action = "list"
        access_key, region = (signed[1], signed[2]) if signed else ("", "")
        request = Request(self.command, self.path, access_key, region, action)
        self.server.requests.append(request)
        refusal = self.server.refuse(request)
        if refusal is not None:
            self.refuse(refusal)
        elif action == "list":
            self.list_objects({name: values[0] for name, values in query.items()})
        elif self.headers.get("If-None-Match") and key in self.server.objects:
            self.refuse(Answer(412, "PreconditionFailed"))
        elif self.command == "PUT":
            self.server.objects[key] = body
            self.answer(200, b"", [("ETag", '"x"')])
        elif self.command == "DELETE":
            self.server.objects.pop(key, None)
            self.answer(204, b"")
        elif self.command == "POST":
            removed = re.findall(r"<Key>([^<]*)</Key>", body.decode())
            for name in removed:
                self.server.objects.pop(name, None)
            xml = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in removed)
            self.answer(200, f"<DeleteResult>{xml}</DeleteResult>".encode())
        elif key in self.server.objects:
            self.read_object(self.server.objects[key])
        else:
            self.refuse(Answer(404, "NoSuchKey"))

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = handle_request  # noqa: N815

    def refuse(self, refusal: Answer) -> None:
        body = ""
        if refusal.code:
            body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{refusal.code}</Code>{refusal.more}</Error>'
        self.answer(refusal.status, body.encode(), refusal.headers)

    def read_object(self, data: bytes) -> None:
        headers = [
            ("ETag", f'"{hashlib.md5(data).hexdigest()}"'),
            ("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT"),
        ]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or self.command == "HEAD":
            self.answer(200, data, headers)
            return
        start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        headers.append(("Content-Range", f"bytes {start}-{end}/{len(data)}"))
        self.answer(206, data[start : end + 1], headers)

    def list_objects(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start = int(query.get("continuation-token", 0))
        entries: list[tuple[bool, str]] = []
        for key in sorted(self.server.objects, key=str.encode):
            if not key.startswith(prefix):
                continue
            head, found, _ = key[len(prefix) :].partition(delimiter or "\0")
            entry = (bool(found), f"{prefix}{head}{found}")
            if entry not in entries:
                entries.append(entry)
        page = entries[start : start + PAGE]
        is_cut = start + PAGE < len(entries)
        in_url = query.get("encoding-type") == "url"
        xml = '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        xml += f"<Name>b</Name><IsTruncated>{str(is_cut).lower()}</IsTruncated>"
        if in_url:
            xml += "<EncodingType>url</EncodingType>"
        if is_cut:
            xml += f"<NextContinuationToken>{start + PAGE}</NextContinuationToken>"
        for is_prefix, key in page:
            shown = quote(key) if in_url else escape(key)
            if is_prefix:
                xml += f"<CommonPrefixes><Prefix>{shown}</Prefix></CommonPrefixes>"
                continue
            size = len(self.server.objects[key])
            xml += f"<Contents><Key>{shown}</Key><Size>{size}</Size><ETag>x</ETag>"
            xml += "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
        xml += "</ListBucketResult>"
        self.answer(200, xml.encode(), [("Content-Type", "application/xml")])
