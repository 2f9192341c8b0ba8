"""What small HTTP servers of tests share: their thread, and how they answer."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeVar


class SmallServer(ThreadingHTTPServer):
    """Server at a free port of this machine."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


ServerT = TypeVar("ServerT", bound=SmallServer)


@contextmanager
def serve(server: ServerT) -> Iterator[ServerT]:
    # How often it looks whether to end: the end of a test waits for it.
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class SmallHandler(BaseHTTPRequestHandler):
    """Handler that logs nothing and keeps connections open."""

    protocol_version = "HTTP/1.1"
    # Without it, the body waits for the client's delayed acknowledgment of the headers.
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def answer(
        self, status: int, body: bytes, headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
