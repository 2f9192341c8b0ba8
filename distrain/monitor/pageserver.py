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

_MAX_CONNECTIONS = 16
_CONNECTION_TIMEOUT_SECONDS = 5.0
_POLL_INTERVAL_SECONDS = 0.1
_MAX_REQUEST_BYTES = 8192
_SEND_BUFFER_BYTES = 1 << 20
"""What the system keeps of an answer for a slow network; it may allow less."""


@dataclass
class _Connection:
    """A connection: what it has asked, and what it has not got yet."""

    deadline: float
    request: bytearray = field(default_factory=bytearray)
    response: memoryview | None = None
    page: bytes | None = None
    """The page that the answer has."""


class PageServer:
    """Serves `page` under /metrics until it is closed. Start it with `start`."""

    def __init__(self, address: str, port: int) -> None:
        """Listen. Raises OSError."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server(
            (address, port), family=family, backlog=1024
        )
        self._listener.setblocking(False)
        self._listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES
        )
        if hasattr(
            socket, "TCP_DEFER_ACCEPT"
        ):  # Linux shows a connection when it has something to read
            self._listener.setsockopt(
                socket.IPPROTO_TCP,
                socket.TCP_DEFER_ACCEPT,
                math.ceil(_CONNECTION_TIMEOUT_SECONDS),
            )
        self.port: int = self._listener.getsockname()[1]
        self.page = b""
        """What is served: replace it as a whole."""
        self.num_reads = 0
        """How often a page was read to its end."""
        self._last_page_read: bytes | None = None
        self._read_event = threading.Event()
        self._wake_sender, self._wake_receiver = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for sock in (self._listener, self._wake_receiver):
            self._selector.register(sock, selectors.EVENT_READ)
        self._connections: dict[socket.socket, _Connection] = {}  # the oldest first
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Serve, on a thread of its own."""
        self._thread = threading.Thread(
            target=self._serve_loop, name="distrain-metrics-http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop, and close all connections."""
        if self._thread is not None:
            self._wake_sender.send(b"x")
            self._thread.join()
        for sock in (
            *self._connections,
            self._listener,
            self._wake_sender,
            self._wake_receiver,
        ):
            sock.close()
        self._selector.close()

    def wait_until_read(self, seconds: float) -> None:
        """Wait until the page as it is now is read, if one has been read before."""
        self._read_event.clear()
        if self.num_reads and self._last_page_read is not self.page:
            self._read_event.wait(seconds)

    def mark_read(self, page: bytes) -> None:
        """Somebody has a page: this one, or one that was rendered before."""
        self.num_reads += 1
        self._last_page_read = page
        if page is self.page:
            self._read_event.set()

    def _serve_loop(self) -> None:
        attended = 0.0
        while True:
            for key, _ in self._selector.select(
                _POLL_INTERVAL_SECONDS if self._connections else None
            ):
                if key.fileobj is self._wake_receiver:
                    return
                self._accept()
            now = time.monotonic()
            if now - attended >= _POLL_INTERVAL_SECONDS:
                attended = now
                for sock, client in list(self._connections.items()):
                    if client.deadline < now:
                        self._close_connection(sock)
                    else:
                        self._handle_connection(sock, client)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # it is gone already
            return
        except (
            OSError
        ):  # no open file is left, say: to ask again at once would take a core
            time.sleep(_POLL_INTERVAL_SECONDS)
            return
        sock.setblocking(False)
        self._connections[sock] = client = _Connection(
            time.monotonic() + _CONNECTION_TIMEOUT_SECONDS
        )
        self._handle_connection(sock, client)
        if len(self._connections) > _MAX_CONNECTIONS:
            self._close_connection(next(iter(self._connections)))

    def _handle_connection(self, sock: socket.socket, connection: _Connection) -> None:
        """Read what is asked and write the answer, as far as that goes now."""
        try:
            while connection.response is None:
                received = sock.recv(4096)
                connection.request += received
                if not received:
                    self._close_connection(sock)
                    return
                if (
                    b"\r\n\r\n" in connection.request
                    or len(connection.request) >= _MAX_REQUEST_BYTES
                ):
                    connection.response = memoryview(self._build_response(connection))
            while connection.response:
                connection.response = connection.response[
                    sock.send(connection.response) :
                ]
        except BlockingIOError:  # at the next tick
            return
        except OSError:  # it is gone
            self._close_connection(sock)
            return
        if connection.page is not None:
            self.mark_read(connection.page)
        self._close_connection(sock)

    def _build_response(self, connection: _Connection) -> bytes:
        words = bytes(connection.request).split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _format_response("400 Bad Request", "this is not HTTP")
        if words[0] != b"GET":
            return _format_response(
                "405 Method Not Allowed", "there is nothing but GET"
            )
        if words[1].partition(b"?")[0] != b"/metrics":
            return _format_response("404 Not Found", "there is nothing but /metrics")
        connection.page = self.page
        return _format_response("200 OK", connection.page, CONTENT_TYPE_LATEST)

    def _close_connection(self, sock: socket.socket) -> None:
        del self._connections[sock]
        sock.close()


def _format_response(
    status: str, body: str | bytes, content_type: str = "text/plain"
) -> bytes:
    content = body if isinstance(body, bytes) else f"{body}\n".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    return head.encode() + content
