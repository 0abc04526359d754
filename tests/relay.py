"""A wire that can be watched, cut and stalled: TCP passed on from a free port to a server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Relay:
    """Passes on what comes, and counts it."""

    def __init__(self, target: str) -> None:
        """Listen, and connect whoever comes to ``target``, "HOST:PORT"."""
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent = 0
        """How many bytes have come from the clients."""
        self.answered = 0
        """How many bytes have come from the server."""
        self.cuts = 0
        """How often all connections were ended."""
        self._changed = threading.Condition()
        self._sockets: list[socket.socket] = []
        self._stalled: set[socket.socket] = set()
        self._cut_at: tuple[str, int] | None = None
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def retarget(self, target: str) -> None:
        """Connect whoever comes from now on to another server."""
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))

    def wait_for(self, *, sent: int, answered: int = 0, timeout_s: float = 30) -> bool:
        """Wait until so many bytes have come, and return whether they have."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self.sent >= sent and self.answered >= answered, timeout_s
            )

    def cut(self) -> None:
        """End all connections; new ones are taken."""
        self.cuts += 1
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut_after(self, *, sent: int | None = None, answered: int = 0) -> None:
        """Cut once so many bytes more have passed, to the byte; those of one direction."""
        way, count = ("answered", answered) if sent is None else ("sent", sent)
        with self._changed:
            self._cut_at = way, getattr(self, way) + count

    def stall(self) -> None:
        """Pass nothing more on, on the connections that there are; new ones are taken, and work."""
        self._stalled = set(self._sockets)

    def close(self) -> None:
        """Take no more connections, and end those that there are."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        self.cut()
        for thread in self._threads:
            thread.join()
        for end in self._sockets:
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._target)
                except OSError:  # Nobody is there, as the client will see.
                    client.close()
                    continue
                self._sockets += [client, server]
                for ends in ((client, server, "sent"), (server, client, "answered")):
                    thread = threading.Thread(target=self._pass_on, args=ends)
                    self._threads.append(thread)
                    thread.start()

    def _pass_on(self, source: socket.socket, target: socket.socket, counter: str) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 18):
                if source not in self._stalled:
                    data, is_last = self._until_cut(data, counter)
                    target.sendall(data)
                    self._count(counter, len(data))
                    if is_last:
                        self.cut()
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _until_cut(self, data: bytes, counter: str) -> tuple[bytes, bool]:
        """Return what may still pass, and whether everything is to be cut then."""
        with self._changed:
            if self._cut_at is None or self._cut_at[0] != counter:
                return data, False
            room = self._cut_at[1] - getattr(self, counter)
            if len(data) < room:
                return data, False
            self._cut_at = None
            return data[:room], True

    def _count(self, counter: str, count: int) -> None:
        with self._changed:
            setattr(self, counter, getattr(self, counter) + count)
            self._changed.notify_all()


@contextmanager
def relay(target: str) -> Iterator[Relay]:
    """Relay to ``target`` for as long as the block runs."""
    running = Relay(target)
    try:
        yield running
    finally:
        running.close()
