"""A TCP proxy in front of the server that breaks answers to GETs of shards, once each, in order."""

import socket
import struct
import threading
import time
from collections import deque


class Proxy:
    """Faults: ("reset", n), ("end", n), ("stall", n), ("flip", n) after n bytes of the answer; ("503", 0)."""

    def __init__(self, upstream: int) -> None:
        self._upstream = ("127.0.0.1", upstream)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.faults: deque[tuple[str, int]] = deque()
        self.applied: list[str] = []
        self.bytes_a_second: float | None = None
        self._closing = False
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._closing = True
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._upstream, timeout=5)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        pending: deque[tuple[str, int] | None] = deque()
        threading.Thread(
            target=self._requests, args=(client, server, pending), daemon=True
        ).start()
        try:
            self._answers(client, server, pending)
        except OSError:
            pass
        finally:
            client.close()
            server.close()

    def _requests(
        self,
        client: socket.socket,
        server: socket.socket,
        pending: deque[tuple[str, int] | None],
    ) -> None:
        try:
            while data := client.recv(1 << 16):
                line = data.split(b"\r\n", 1)[0]
                fault = (
                    self.faults.popleft()
                    if self.faults and line.startswith(b"GET ") and b".parquet" in line
                    else None
                )
                if fault:
                    self.applied.append(fault[0])
                if fault and fault[0] == "503":
                    body = (
                        b"<Error><Code>SlowDown</Code><Message>slow</Message></Error>"
                    )
                    head = b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n"
                    client.sendall(head % len(body) + body)
                    continue
                pending.append(fault)
                server.sendall(data)
        except OSError:
            pass
        finally:
            server.close()

    def _answers(
        self,
        client: socket.socket,
        server: socket.socket,
        pending: deque[tuple[str, int] | None],
    ) -> None:
        fault: tuple[str, int] | None = None
        sent = 0
        while data := server.recv(1 << 16):
            if pending:
                fault, sent = pending.popleft(), 0
            if fault and sent + len(data) > fault[1]:
                kind, at = fault[0], fault[1] - sent
                fault = None
                if kind == "flip":
                    data = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
                elif kind == "stall":
                    client.sendall(data[:at])
                    time.sleep(3600)
                else:
                    client.sendall(data[:at])
                    if kind == "reset":
                        client.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )
                    return
            client.sendall(data)
            sent += len(data)
            if self.bytes_a_second:
                time.sleep(len(data) / self.bytes_a_second)
