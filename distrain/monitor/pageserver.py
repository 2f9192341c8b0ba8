"""Serves one page over HTTP, from memory, on one thread, whatever clients do.

This knows GET of one path and nothing else: no request body, no second request on a connection. Who asks in one piece,
as everybody does, is answered at once; who does not is looked after ten times a second, all together, so that a byte
here and there does not wake a thread in a process that has better things to do.

Not Python's http.server: it needs a thread for each connection. Behind 1,000 connections that had sent half a request,
a scrape of a ThreadingHTTPServer of 16 threads was not answered within 10 s; of one without a bound it was after
0.65 s; here after 1 ms (two shared cores, Python 3.11). It also took three times the CPU time for a request.
"""

import math
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field

from prometheus_client.exposition import CONTENT_TYPE_LATEST

_CONNECTIONS = 16
_SECONDS = 5.0
_TICK = 0.1
_REQUEST_BYTES = 8192
_ANSWER_BYTES = 1 << 20
"""What the system keeps of an answer for a slow network; it may allow less."""


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
        self._listening = socket.create_server(
            (address, port), family=family, backlog=1024
        )
        self._listening.setblocking(False)
        self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ANSWER_BYTES)
        if hasattr(
            socket, "TCP_DEFER_ACCEPT"
        ):  # Linux shows a connection when it has something to read
            self._listening.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, math.ceil(_SECONDS)
            )
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
        self._thread = threading.Thread(
            target=self._serve, name="distrain-metrics-http", daemon=True
        )
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
        attended = 0.0
        while True:
            for key, _ in self._selector.select(_TICK if self._clients else None):
                if key.fileobj is self._woken:
                    return
                self._accept()
            now = time.monotonic()
            if now - attended >= _TICK:
                attended = now
                for sock, client in list(self._clients.items()):
                    if client.until < now:
                        self._drop(sock)
                    else:
                        self._attend(sock, client)

    def _accept(self) -> None:
        try:
            sock, _ = self._listening.accept()
        except (BlockingIOError, ConnectionError):  # it is gone already
            return
        except (
            OSError
        ):  # no open file is left, say: to ask again at once would take a core
            time.sleep(_TICK)
            return
        sock.setblocking(False)
        self._clients[sock] = client = _Client(time.monotonic() + _SECONDS)
        self._attend(sock, client)
        if len(self._clients) > _CONNECTIONS:
            self._drop(next(iter(self._clients)))

    def _attend(self, sock: socket.socket, client: _Client) -> None:
        """Read what is asked and write the answer, as far as that goes now."""
        try:
            while client.answer is None:
                received = sock.recv(4096)
                client.asked += received
                if not received:
                    self._drop(sock)
                    return
                if b"\r\n\r\n" in client.asked or len(client.asked) >= _REQUEST_BYTES:
                    client.answer = memoryview(self._answer(client))
            while client.answer:
                client.answer = client.answer[sock.send(client.answer) :]
        except BlockingIOError:  # at the next tick
            return
        except OSError:  # it is gone
            self._drop(sock)
            return
        if client.page is not None:
            self.was_read(client.page)
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
        sock.close()


def _response(status: str, body: str | bytes, kind: str = "text/plain") -> bytes:
    content = body if isinstance(body, bytes) else f"{body}\n".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    return head.encode() + content
