"""Folders on web servers, listed by the pages that such servers make."""

from urllib.parse import quote, unquote, urlsplit

import pytest
from small_server import SmallHandler, SmallServer, serve

from distrain.data.prepare.open import _find_files_in_folder, open_source
from distrain.data.storage import retry as retry_module
from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.retry import RefusedError, is_transient
from distrain.data.storage.store import Store
from distrain.data.storage.web_storage import parse_index

APACHE = """<!DOCTYPE HTML PUBLIC "-//W3C//DTD HTML 3.2 Final//EN">
<html><head><title>Index of /photos</title></head><body><h1>Index of /photos</h1>
<table><tr><th valign="top"><img src="/icons/blank.gif" alt="[ICO]"></th>
<th><a href="?C=N;O=D">Name</a></th><th><a href="?C=M;O=A">Last modified</a></th></tr>
<tr><td><img src="/icons/back.gif"></td><td><a href="/">Parent Directory</a></td></tr>
ROWS</table><address>Apache/2.4.58 (Ubuntu) Server at localhost Port 80</address>
</body></html>"""
APACHE_ROW = """<tr><td><img src="/icons/image2.gif" alt="[IMG]"></td>
<td><a href="{}">{}</a></td><td align="right">  - </td></tr>
"""
NGINX = """<html><head><title>Index of /photos/</title></head>\r
<body><h1>Index of /photos/</h1><hr><pre><a href="../">../</a>\r
ROWS</pre><hr></body></html>\r
"""
NGINX_ROW = '<a href="{}">{:.47}..&gt;</a>      01-Jan-2024 00:00    -\r\n'
PYTHON = """<!DOCTYPE HTML>
<html lang="en"><head><meta charset="utf-8"><title>Directory listing</title></head>
<body><hr><ul>
ROWS</ul><hr></body></html>
"""
PYTHON_ROW = '<li><a href="{}">{}</a></li>\n'
LIGHTTPD = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE html>
<html><body><div class="list"><table summary="Directory Listing"><tbody>
<tr class="d"><td class="n"><a href="../">..</a>/</td></tr>ROWS</tbody></table></div>
<div class="foot"><a href='https://example.invalid/photos/a'>lighttpd/1.4.69</a>
<a href="mailto:me@example.invalid">me</a> <a href="#top">top</a></div></body></html>
"""
LIGHTTPD_ROW = '<tr class="d"><td class="n"><a href="{}">{}</a>/</td></tr>\n'
# Caddy and S3 browsers write "./name"; others whole paths.
DOTTED_ROW = '<A class="name" HREF="./{}">{}</A>\n'
ROOTED_ROW = "<a href='/photos/{}'>{}</a>\n"

SERVERS = {
    "apache": (APACHE, APACHE_ROW),
    "nginx": (NGINX, NGINX_ROW),
    "python": (PYTHON, PYTHON_ROW),
    "lighttpd": (LIGHTTPD, LIGHTTPD_ROW),
    "caddy": (PYTHON, DOTTED_ROW),
    "whole paths": (PYTHON, ROOTED_ROW),
}
NAMES = [
    "golden retriever",
    "R&D <b>",
    "100%",
    "%41",
    "a+b",
    "é",
    "e\u0301",
    "#1?",
    'it\'s "it"',
    "semi;colon",
    "x" * 60,
]


GONE = -1
"""Status of a server that closes the connection without an answer."""


class WebServer(SmallServer):
    """Files by path, folders by an index page, and answers that a test sets."""

    def __init__(self):
        super().__init__(_Handler)
        self.files = {}
        self.template, self.row = SERVERS["python"]
        self.requests = []
        self.status = lambda method, path: None
        self.moved = {}


class _Handler(SmallHandler):
    def handle_request(self):
        server, path = self.server, unquote(urlsplit(self.path).path)
        server.requests.append((self.command, self.path))
        status = server.status(self.command, path)
        if status == GONE:
            self.close_connection = True
        elif status is not None:
            self.answer(status, b"")
        elif path in server.moved:
            self.answer(302, b"", [("Location", server.moved[path])])
        elif path in server.files:
            self.answer(200, server.files[path])
        elif not path.endswith("/") and any(
            f.startswith(f"{path}/") for f in server.files
        ):
            self.answer(301, b"", [("Location", quote(f"{path}/"))])
        elif any(f.startswith(path) for f in server.files):
            self.answer(200, self.make_index(path), [("Content-Type", "text/html")])
        else:
            self.answer(404, b"")

    do_GET = do_HEAD = handle_request  # noqa: N815

    def make_index(self, path):
        names = []
        for file in self.server.files:
            head, slash, _ = file.removeprefix(path).partition("/")
            if file.startswith(path) and head + slash not in names:
                names.append(head + slash)
        row = self.server.row.replace("/photos/", quote(path).replace("'", "&#39;"))
        rows = "".join(row.format(quote(n).replace("'", "&#39;"), n) for n in names)
        return self.server.template.replace("ROWS", rows).encode()


@pytest.fixture
def web(clean_aws):
    with serve(WebServer()) as server:
        yield server


@pytest.mark.parametrize("kind", SERVERS)
def test_classes_and_images_of_an_index(web, kind):
    web.template, web.row = SERVERS[kind]
    web.files = {
        f"/photos/{c}/{n}.jpg": b"x" for c in NAMES for n in ("1 2", *NAMES[:3])
    }
    source = open_source(f"{web.url}/photos").source
    assert source.classes == tuple(sorted(NAMES))
    assert len(source.blocks) == 4 * len(NAMES)
    assert source.rejects == []
    for block in source.blocks:
        (row,) = source.reader.read_block(block)
        assert row.data == b"x"


@pytest.mark.parametrize("kind", SERVERS)
def test_shards_by_a_pattern(web, kind):
    web.template, web.row = SERVERS[kind]
    web.files = {f"/photos/{n}": b"x" for n in ("train-0.tar", "train-1.tar", "x.txt")}
    store = Store(f"{web.url}/photos")
    assert store.list_entries() == [
        DirectoryEntry(name, None, False)
        for name in ("train-0.tar", "train-1.tar", "x.txt")
    ]
    assert not store.is_folder("train-0.tar")
    assert (store.exists("x.txt"), store.exists("y.txt")) == (True, False)
    assert store.get_size("x.txt") == 1


def test_links_to_elsewhere_are_no_entries():
    page = b"""<a href=a.jpg>a</a> <a href="b/">b</a> <a href="b/">again</a> <a name="x">x</a>
        <a href="">self</a> <a href="?C=N;O=D">N</a> <a href="c.jpg?C=N">c</a> <a href="#d">d</a>
        <a href="../">up</a> <a href="/">root</a> <a href="..">up</a> <a href=".">here</a>
        <a href="b/deep.jpg">deep</a> <a href="http://other.invalid/p/e.jpg">e</a>
        <a href="//host.invalid/p/f.jpg">f</a> <a href="https://host.invalid/p/g.jpg">g</a>
        <a href="mailto:x@host.invalid">m</a> <a href="javascript:void(0)">j</a> <a href="http://[">bad</a>
        <img src="i.jpg"> http://host.invalid/p/text.jpg <a href="sl%2Fash.jpg">s</a> <a href="%ff.jpg">z</a>"""
    entries = parse_index(page, "http://user:word@host.invalid/p/")
    assert [entry.name for entry in entries if not entry.is_special] == [
        "a.jpg",
        "b",
        "f.jpg",
        "g.jpg",
        "\udcff.jpg",
    ]
    assert [entry.name for entry in entries if entry.is_special] == ["sl/ash.jpg"]


def test_a_folder_that_is_moved(web):
    web.template, web.row = SERVERS["whole paths"]
    web.files = {"/there/photos/a/1.jpg": b"x"}
    web.moved = {"/photos/": "/there/photos/"}
    assert Store(f"{web.url}/photos").list_names() == ["a"]


def test_a_name_of_bytes_that_are_no_text(web):
    web.status = lambda _, path: 403 if path == "/p/\ufffd.jpg" else None
    with pytest.raises(RefusedError, match="HTTP 403"):
        Store(f"{web.url}/p").read("\udcff.jpg")
    assert web.requests == [("GET", "/p/%FF.jpg")]


def test_a_server_that_asks_for_a_password(web):
    web.status = lambda *_: 401
    with pytest.raises(RefusedError, match="the server asks for a password for http"):
        Store(f"{web.url}/p").read("x")


def test_a_server_that_is_not_trusted(web, monkeypatch):
    store = Store(f"{web.url}/p")

    def fail(*_, **__):
        raise OSError("[SSL: CERTIFICATE_VERIFY_FAILED] unable to get local issuer")

    monkeypatch.setattr(store.backend._fs, "cat_file", fail)
    message = r"the certificate of 127\.0\.0\.1:\d+ is not trusted: set SSL_CERT_FILE"
    with pytest.raises(RefusedError, match=message):
        store.read("x")


def test_a_server_that_does_not_say_a_size(web, monkeypatch):
    store = Store(f"{web.url}/p")
    monkeypatch.setattr(store.backend._fs, "info", lambda _: {"size": None})
    with pytest.raises(RefusedError, match="does not say the size of .*/p/x: use one"):
        store.get_size("x")


@pytest.mark.parametrize("status", [400, 401, 403, 405, 407, 451, 501])
def test_what_is_refused_is_said_at_once(web, status, monkeypatch):
    def fail(_):
        raise AssertionError("it is retried")

    monkeypatch.setattr(retry_module.time, "sleep", fail)
    web.files = {"/p/x": b"x"}
    web.status = lambda *_: status
    store = Store(f"{web.url.replace('//', '//me:WORD@')}/p")
    for act in (
        lambda: store.read("x", retry_seconds=60),
        lambda: store.get_size("x"),
        lambda: store.exists("x"),
        store.list_names,
    ):
        web.requests.clear()
        with pytest.raises(RefusedError, match=rf"/p.*HTTP {status}") as refused:
            act()
        assert "WORD" not in str(refused.value)
        assert len(web.requests) <= 2


@pytest.mark.parametrize("status", [404, 410])
def test_what_is_missing(web, status):
    web.status = lambda *_: status
    store = Store(f"{web.url}/p")
    assert (store.exists("x"), store.list_names()) == (False, [])
    for act in (store.read, store.get_size):
        with pytest.raises(FileNotFoundError):
            act("x")


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_what_may_pass(web, status):
    web.status = lambda *_: status
    store = Store(f"{web.url}/p")
    for act in (store.read, store.get_size, store.exists, store.list_names):
        with pytest.raises(OSError, match=f"HTTP {status}") as failed:
            act("x")
        assert is_transient(failed.value)


def test_a_server_that_refuses_head(web):
    web.files = {"/p/x.bin": b"12345"}
    web.status = lambda method, _: 405 if method == "HEAD" else None
    store = Store(f"{web.url}/p")
    assert (store.exists("x.bin"), store.get_size("x.bin")) == (True, 5)


def test_a_file_of_a_folder_that_may_not_be_listed(web):
    web.files = {"/p/x.tar": b"12345"}
    web.status = lambda _, path: 403 if path.endswith("/") else None
    store = Store(f"{web.url}/p")
    found = _find_files_in_folder(store, "x.tar")
    assert found.files == [DirectoryEntry("x.tar", 5, False)]
    with pytest.raises(RefusedError, match="HTTP 403"):
        _find_files_in_folder(store, "*.tar")


def test_a_server_that_is_away_may_come_back(clean_aws):
    store = Store("http://127.0.0.1:9/p")
    for act in (store.read, store.get_size, store.exists, store.list_names):
        with pytest.raises(OSError, match="127.0.0.1") as failed:
            act("x")
        assert is_transient(failed.value)


def test_a_server_that_goes_away_has_the_file_all_the_same(web):
    web.files = {"/p/x": b"x"}
    web.status = lambda *_: GONE
    store = Store(f"{web.url}/p")
    for act in (store.read, store.get_size, store.exists, store.list_names):
        with pytest.raises(OSError, match="disconnected") as failed:
            act("x")
        assert is_transient(failed.value)


def test_a_server_that_sends_all_for_a_part(web):
    """As `python -m http.server` does: the part would begin at a wrong byte."""
    web.files = {"/p/x.tar": b"12345"}
    store = Store(f"{web.url}/p")
    for start, end in ((0, 5), (0, 99), (None, 5), (0, None)):
        assert store.read("x.tar", start, end) == b"12345"
    for start, end in ((0, 4), (1, 5), (2, None)):
        with pytest.raises(RefusedError, match=r"/p/x\.tar where a part is asked for"):
            store.read("x.tar", start, end, retry_seconds=60)


def test_a_file_is_not_read_for_an_index_page(web):
    """Some servers give x.zip at x.zip/ too."""
    web.files = {"/p/x.zip/": b"<a href=a.jpg>"}
    store = Store(f"{web.url}/p")
    assert store.list_names("x.zip") == []
    assert not store.is_folder("x.zip")


# --- proxies


@pytest.fixture
def proxy(web, clean_aws):
    """A proxy that answers all itself, and the environment that names it."""
    with serve(WebServer()) as server:
        server.files = {"/p/x": b"by way of the proxy"}
        for name in ("HTTP_PROXY", "http_proxy"):
            clean_aws.setenv(name, server.url)
        yield server


def test_a_proxy_is_for_other_hosts_alone(web, proxy, clean_aws):
    web.files = {"/p/x": b"here"}
    assert Store(f"{web.url}/p").read("x") == b"here"
    assert not proxy.requests
    outside = Store("http://1.2.3.4/p")
    assert outside.read("x") == b"by way of the proxy"
    assert proxy.requests[0] == ("GET", "http://1.2.3.4/p/x")


def test_a_bucket_on_this_machine_is_not_behind_a_proxy(bucket, clean_aws):
    bucket.objects = {"p/x": b"here"}
    for name in ("HTTP_PROXY", "http_proxy", "https_proxy"):
        clean_aws.setenv(name, "http://127.0.0.1:9")
    assert Store("s3://b/p").read("x") == b"here"
    clean_aws.setenv("AWS_ENDPOINT_URL", "http://1.2.3.4")
    with pytest.raises(OSError, match=r"1\.2\.3\.4"):
        Store("s3://b/p").read("x")
