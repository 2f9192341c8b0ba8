"""Serves one page over HTTP, from memory, on one thread, whatever clients do.

Python's http.server takes a thread and half a millisecond a request, in the process that trains; this takes a tenth of
it. It knows GET of one path and nothing else: no request body, no second request on a connection.
"""

import selectors
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

from prometheus_client.exposition import CONTENT_TYPE_LATEST

_CONNECTIONS = 16
_SECONDS = 5.0
_REQUEST_BYTES = 8192


@dataclass
class _Client:
    """A connection: what it has asked, and what it has not got yet."""

    until: float
    asked: bytearray = field(default_factory=bytearray)
    answer: memoryview | None = None
    page: bytes | None = None
    """The page that the answer has."""


class PageServer:
    """Serves `page` under /metrics until it is closed. Start it with `start`."""

    def __init__(self, address: str, port: int) -> None:
        """Listen. Raises OSError."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listening = socket.create_server((address, port), family=family, backlog=128)
        self._listening.setblocking(False)
        self.port: int = self._listening.getsockname()[1]
        self.page = b""
        """What is served: replace it as a whole."""
        self.reads = 0
        """How often a page was read to its end."""
        self._last_read: bytes | None = None
        self._read = threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for sock in (self._listening, self._woken):
            self._selector.register(sock, selectors.EVENT_READ)
        self._clients: dict[socket.socket, _Client] = {}  # the oldest first
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Serve, on a thread of its own."""
        self._thread = threading.Thread(target=self._serve, name="distrain-metrics-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and close all connections."""
        if self._thread is not None:
            self._wake.send(b"x")
            self._thread.join()
        for sock in (*self._clients, self._listening, self._wake, self._woken):
            sock.close()
        self._selector.close()

    def await_read(self, seconds: float) -> None:
        """Wait until the page as it is now is read, if one has been read before."""
        self._read.clear()
        if self.reads and self._last_read is not self.page:
            self._read.wait(seconds)

    def was_read(self, page: bytes) -> None:
        """Somebody has a page: this one, or one that was rendered before."""
        self.reads += 1
        self._last_read = page
        if page is self.page:
            self._read.set()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select(timeout=1.0):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is self._woken:
                    return
                if sock is self._listening:
                    self._accept()
                elif sock in self._clients:  # it may have been closed in this round, as the oldest
                    try:
                        self._attend(sock, self._clients[sock])
                    except OSError:  # it is gone
                        self._drop(sock)
            now = time.monotonic()
            for sock in [sock for sock, client in self._clients.items() if client.until < now]:
                self._drop(sock)

    def _accept(self) -> None:
        with suppress(OSError):  # there is no more, or it is gone already
            sock, _ = self._listening.accept()
            sock.setblocking(False)
            self._clients[sock] = _Client(time.monotonic() + _SECONDS)
            self._selector.register(sock, selectors.EVENT_READ)
        if len(self._clients) > _CONNECTIONS:
            self._drop(next(iter(self._clients)))

    def _attend(self, sock: socket.socket, client: _Client) -> None:
        """Read what is asked, or write what is left of the answer."""
        if client.answer is None:
            received = sock.recv(4096)
            client.asked += received
            if not received:
                self._drop(sock)
                return
            if b"\r\n\r\n" not in client.asked and len(client.asked) < _REQUEST_BYTES:
                return
            client.answer = memoryview(self._answer(client))
            self._selector.modify(sock, selectors.EVENT_WRITE)
        client.answer = client.answer[sock.send(client.answer) :]
        if not client.answer:
            if client.page is not None:
                self.was_read(client.page)
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
            self._drop(sock)

    def _answer(self, client: _Client) -> bytes:
        words = bytes(client.asked).split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request", "this is not HTTP")
        if words[0] != b"GET":
            return _response("405 Method Not Allowed", "there is nothing but GET")
        if words[1].partition(b"?")[0] != b"/metrics":
            return _response("404 Not Found", "there is nothing but /metrics")
        client.page = self.page
        return _response("200 OK", client.page, CONTENT_TYPE_LATEST)

    def _drop(self, sock: socket.socket) -> None:
        del self._clients[sock]
        self._selector.unregister(sock)
        sock.close()


def _response(status: str, body: str | bytes, kind: str = "text/plain") -> bytes:
    content = body if isinstance(body, bytes) else f"{body}\n".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    return head.encode() + content
