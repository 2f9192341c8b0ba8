"""HTTP server for one page, from memory, on one thread, whatever clients do.

It answers GET of one path and nothing else: no request body, no second request on a
connection. A client that sends its request in one piece, as all usual clients do, is
answered at once. All other connections are served together, ten times per second, so
that clients that write byte by byte do not keep waking a thread of a training process.

It is not Python's http.server, which needs a thread per connection. With 1,000 open
connections that had sent half a request, a scrape of a ThreadingHTTPServer of 16
threads was not answered within 10 s; without a bound on its threads it was answered
after 0.65 s; here after 1 ms (two shared cores, Python 3.11). It also took three times
the CPU time per request.
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
# Bytes of a response that the system holds for a slow network; it may allow fewer.
_SEND_BUFFER_BYTES = 1 << 20


@dataclass
class _Connection:
    deadline: float
    """Time at which it is closed, by the monotonic clock."""
    request: bytearray = field(default_factory=bytearray)
    """Bytes received so far."""
    response: memoryview | None = None
    """Bytes not sent yet; None until the request is complete."""
    page: bytes | None = None
    """Page that the response holds; None for an error."""


class PageServer:
    """Server of `page` under /metrics. Start it with `start`, and close it."""

    def __init__(self, address: str, port: int) -> None:
        """Listen on the address.

        Args:
            address: IPv4 or IPv6 address, or host name.
            port: 0 for any free port.

        Raises:
            OSError: the address or the port cannot be listened on.
        """
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server(
            (address, port), family=family, backlog=1024
        )
        self._listener.setblocking(False)
        # Connections inherit the size of the buffer.
        self._listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES
        )
        # Linux then reports a connection only when it has something to read, so that
        # silent clients do not wake the thread.
        if hasattr(socket, "TCP_DEFER_ACCEPT"):
            self._listener.setsockopt(
                socket.IPPROTO_TCP,
                socket.TCP_DEFER_ACCEPT,
                math.ceil(_CONNECTION_TIMEOUT_SECONDS),
            )

        self.port: int = self._listener.getsockname()[1]
        self.page = b""
        """Page that is served: replace it as a whole, from any thread."""
        self.num_reads = 0
        """Number of times that a page was read to its end."""
        self._last_page_read: bytes | None = None
        self._read_event = threading.Event()

        # A socket pair, because only a socket can wake a selector.
        self._wake_sender, self._wake_receiver = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for sock in (self._listener, self._wake_receiver):
            self._selector.register(sock, selectors.EVENT_READ)
        # The oldest connection first.
        self._connections: dict[socket.socket, _Connection] = {}
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Serve the page, on a thread of its own."""
        self._thread = threading.Thread(
            target=self._serve_loop, name="distrain-metrics-http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving, and close all connections."""
        # End the thread first: it uses the sockets.
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
        """Wait until the current page is read, if any page has been read before.

        Args:
            seconds: to wait at most.
        """
        # Clear before the check: a read in between sets the event again.
        self._read_event.clear()
        if self.num_reads and self._last_page_read is not self.page:
            self._read_event.wait(seconds)

    def mark_read(self, page: bytes) -> None:
        """Record that a client has read `page`, the current one or an older one."""
        self.num_reads += 1
        self._last_page_read = page
        if page is self.page:
            self._read_event.set()

    def _serve_loop(self) -> None:
        last_poll = 0.0
        while True:
            # Open connections are not in the selector, but polled below.
            timeout = _POLL_INTERVAL_SECONDS if self._connections else None
            for key, _ in self._selector.select(timeout):
                if key.fileobj is self._wake_receiver:
                    return
                self._accept()
            now = time.monotonic()
            if now - last_poll >= _POLL_INTERVAL_SECONDS:
                last_poll = now
                self._poll_connections(now)

    def _poll_connections(self, now: float) -> None:
        # A copy of the list: connections are closed meanwhile.
        for sock, connection in list(self._connections.items()):
            if connection.deadline < now:
                self._close_connection(sock)
            else:
                self._handle_connection(sock, connection)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            # The client has gone already.
            return
        except OSError:
            # No more files can be opened, for example. The connection stays in the
            # queue, so to retry at once would keep a core busy.
            time.sleep(_POLL_INTERVAL_SECONDS)
            return
        sock.setblocking(False)
        deadline = time.monotonic() + _CONNECTION_TIMEOUT_SECONDS
        connection = _Connection(deadline)
        self._connections[sock] = connection
        self._handle_connection(sock, connection)
        # Close the oldest one, so that a crowd of silent clients locks nobody out.
        if len(self._connections) > _MAX_CONNECTIONS:
            self._close_connection(next(iter(self._connections)))

    def _handle_connection(self, sock: socket.socket, connection: _Connection) -> None:
        """Read the request and write the response, as far as that needs no waiting."""
        try:
            # Read until the request is complete.
            while connection.response is None:
                received = sock.recv(4096)
                connection.request += received
                if not received:
                    self._close_connection(sock)
                    return
                is_complete = b"\r\n\r\n" in connection.request
                if is_complete or len(connection.request) >= _MAX_REQUEST_BYTES:
                    connection.response = memoryview(self._build_response(connection))
            # Write what the system takes.
            while connection.response:
                num_sent = sock.send(connection.response)
                connection.response = connection.response[num_sent:]
        except BlockingIOError:
            # The next poll resumes here.
            return
        except OSError:
            # The client has gone.
            self._close_connection(sock)
            return
        if connection.page is not None:
            self.mark_read(connection.page)
        self._close_connection(sock)

    def _build_response(self, connection: _Connection) -> bytes:
        request_line = bytes(connection.request).split(b"\r\n", 1)[0]
        words = request_line.split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _format_response("400 Bad Request", "this is not an HTTP/1 request")
        method, target, _ = words
        if method != b"GET":
            return _format_response("405 Method Not Allowed", "only GET is supported")
        if target.partition(b"?")[0] != b"/metrics":
            return _format_response("404 Not Found", "the only page is /metrics")
        connection.page = self.page
        return _format_response("200 OK", connection.page, CONTENT_TYPE_LATEST)

    def _close_connection(self, sock: socket.socket) -> None:
        del self._connections[sock]
        sock.close()


def _format_response(
    status: str, body: str | bytes, content_type: str = "text/plain"
) -> bytes:
    content = body if isinstance(body, bytes) else f"{body}\n".encode()
    lines = [
        f"HTTP/1.1 {status}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(content)}",
        "Connection: close",
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + content
