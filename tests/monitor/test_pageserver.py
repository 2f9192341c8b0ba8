"""One page, one thread, and clients of all kinds."""

import http.client
import resource
import socket
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

import distrain.monitor.pageserver
from distrain.monitor.pageserver import PageServer

PAGE = b"a_metric 1.0\n" * 1000


@pytest.fixture
def server():
    found = PageServer("127.0.0.1", 0)
    found.page = PAGE
    found.start()
    yield found
    found.close()


def ask(server, request, seconds=10.0):
    """What comes back for the bytes of a request, to the end of the connection."""
    with closing(
        socket.create_connection(("127.0.0.1", server.port), timeout=seconds)
    ) as client:
        client.sendall(request)
        answer = b""
        with suppress(ConnectionResetError):
            while part := client.recv(65536):
                answer += part
        return answer


def get(server, path="/metrics"):
    with closing(
        http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    ) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_the_page_and_nothing_else(server):
    assert get(server) == (200, PAGE)
    assert get(server, "/metrics?name=x")[0] == 200
    for path in ("/", "/metrics/..", "/etc/passwd", "/metricsx"):
        assert get(server, path)[0] == 404
    assert ask(
        server, b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"
    ).startswith(b"HTTP/1.1 405 ")
    assert get(server) == (200, PAGE)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x00\xff nonsense\r\n\r\n",
        b"\r\n\r\n",
        b"GET /metrics\r\n\r\n",
        b"GET /metrics FTP/1.0\r\n\r\n",
        b"GET  /metrics  HTTP/1.1\r\n\r\n",
        b"x" * 20_000,
    ],
)
def test_what_is_not_http(server, request_bytes):
    assert ask(server, request_bytes).startswith(b"HTTP/1.1 400 ")
    assert get(server)[0] == 200


def test_a_request_that_comes_byte_by_byte(server):
    with closing(
        socket.create_connection(("127.0.0.1", server.port), timeout=10)
    ) as client:
        for byte in b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n":
            client.send(bytes([byte]))
        answer = b""
        while part := client.recv(65536):
            answer += part
    assert answer.endswith(PAGE)


def test_a_page_larger_than_a_socket_takes_at_once(server):
    server.page = large = b"x" * (8 << 20)
    with closing(
        socket.create_connection(("127.0.0.1", server.port), timeout=10)
    ) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        time.sleep(0.2)  # nobody reads yet; others are served meanwhile
        assert get(server, "/other")[0] == 404
        answer = b""
        while part := client.recv(1 << 20):
            answer += part
    assert answer.endswith(large)


@pytest.mark.parametrize("begun", [b"", b"GET /met"])
def test_a_crowd_does_not_keep_a_scrape_out(server, monkeypatch, begun):
    """Those that say nothing, or no more, make room long before their time is up, and none has a thread."""
    monkeypatch.setattr(
        distrain.monitor.pageserver, "_CONNECTION_TIMEOUT_SECONDS", 3600.0
    )
    threads, crowd = threading.active_count(), []
    try:
        for _ in range(1000):
            with suppress(OSError):
                crowd.append(
                    socket.create_connection(("127.0.0.1", server.port), timeout=10)
                )
                crowd[-1].send(begun)
        assert len(crowd) > 500
        assert get(server) == (200, PAGE)
        assert threading.active_count() == threads
        if begun:
            with suppress(ConnectionResetError):
                assert crowd[0].recv(1) == b"", "the oldest was closed"
    finally:
        for client in crowd:
            client.close()


def test_clients_that_write_byte_by_byte_are_looked_after_together(server):
    """A process that trains is not woken for each byte."""

    def woken() -> int:
        status = Path(f"/proc/self/task/{server._thread.native_id}/status").read_text()
        return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    clients = [
        socket.create_connection(("127.0.0.1", server.port), timeout=10)
        for _ in range(10)
    ]
    try:
        began, before = time.monotonic(), woken()
        for byte in b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 100:
            for client in clients:
                client.send(bytes([byte]))
            time.sleep(0.002)
        ticks = (
            time.monotonic() - began
        ) / distrain.monitor.pageserver._POLL_INTERVAL_SECONDS
        assert woken() - before < 5 * ticks + 3 * len(clients), "of 1,270 bytes"
    finally:
        for client in clients:
            client.close()


def test_a_client_that_says_nothing_is_dropped_after_a_while(server, monkeypatch):
    monkeypatch.setattr(distrain.monitor.pageserver, "_CONNECTION_TIMEOUT_SECONDS", 0.1)
    assert ask(server, b"GET /met") == b""


def test_a_client_that_never_says_anything_is_dropped_too(monkeypatch):
    """The system shows its connection at last, after as long again."""
    monkeypatch.setattr(distrain.monitor.pageserver, "_CONNECTION_TIMEOUT_SECONDS", 0.1)
    server = PageServer("127.0.0.1", 0)
    server.start()
    try:
        assert ask(server, b"") == b""
    finally:
        server.close()


def test_no_open_file_is_left(server):
    """It does not spin meanwhile, and serves again afterwards."""
    path = Path(f"/proc/self/task/{server._thread.native_id}/schedstat")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as client:
        client.settimeout(10)
        with path.open() as busy:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                client.connect(("127.0.0.1", server.port))
                client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
                before = int(busy.read().split()[0])
                time.sleep(0.5)
                busy.seek(0)
                spent = int(busy.read().split()[0]) - before
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert client.recv(15) == b"HTTP/1.1 200 OK"
    assert spent < 0.1e9, "nanoseconds on a core"


def test_clients_that_go_away(server):
    for _ in range(50):
        client = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        client.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
        )
        client.send(b"GET /metrics HTTP/1.1\r\n\r\n")
        client.close()  # with a reset
    assert get(server) == (200, PAGE)


def test_a_read_of_the_page_before_does_not_count(server):
    """A scrape that is under way while the last page is rendered has the one before."""
    before = server.page
    server.mark_read(before)
    server.page = b"the last"
    waiting = threading.Thread(target=server.wait_until_read, args=(60.0,))
    waiting.start()
    time.sleep(0.05)
    server.mark_read(before)
    waiting.join(0.3)
    assert waiting.is_alive()
    assert get(server) == (200, b"the last")
    waiting.join(20)
    assert not waiting.is_alive()


def test_a_port_that_is_taken(server):
    with pytest.raises(OSError, match="in use"):
        PageServer("127.0.0.1", server.port)
