"""A way to a server that is cut where a scenario says, and mended at once."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Literal, TypeAlias

Way: TypeAlias = Literal["sent", "answered"]
Cut: TypeAlias = Mapping[Way, int]
"""After how many bytes from the client, or from the server, counted from the cut before."""

_READ_BYTES = 1 << 16


class CutWire:
    """Passes on what clients and a server say to each other, TCP by TCP."""

    def __init__(self, target: str, cuts: Sequence[Cut]) -> None:
        """Listen, and connect whoever comes to ``target``, "HOST:PORT"."""
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self.ahead = list(cuts)
        """The cuts that are still to come."""
        self._passed: dict[Way, int] = {"sent": 0, "answered": 0}
        self._lock = threading.Lock()
        self._ends: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections, and end those that there are."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            self._cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                with self._lock:
                    self._ends |= {client, server}
                directions: list[tuple[socket.socket, socket.socket, Way]] = [
                    (client, server, "sent"),
                    (server, client, "answered"),
                ]
                for direction in directions:
                    threading.Thread(target=self._pass_on, args=direction, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, way: Way) -> None:
        with suppress(OSError):
            while data := source.recv(_READ_BYTES):
                target.sendall(self._until_cut(source, data, way))
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _until_cut(self, source: socket.socket, data: bytes, way: Way) -> bytes:
        """Count what passes; return nothing of what comes with the cut, or after it."""
        with self._lock:
            if source not in self._ends:
                return b""
            self._passed[way] += len(data)
            if not self.ahead or self._passed[way] <= self.ahead[0].get(way, self._passed[way]):
                return data
            del self.ahead[0]
            self._cut()
            return b""

    def _cut(self) -> None:
        """End all connections."""
        self._passed = {"sent": 0, "answered": 0}
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._ends.clear()


@contextmanager
def cut_wire(target: str, cuts: Sequence[Cut]) -> Iterator[CutWire]:
    """Lead to ``target`` for as long as the block runs."""
    wire = CutWire(target, cuts)
    try:
        yield wire
    finally:
        wire.close()
