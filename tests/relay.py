"""A wire that can be watched, and cut: TCP passed on from a free port to a server."""

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
        self._changed = threading.Condition()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def wait_for(self, *, sent: int, answered: int = 0, timeout_s: float = 30) -> bool:
        """Wait until so many bytes have come, and return whether they have."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self.sent >= sent and self.answered >= answered, timeout_s
            )

    def cut(self) -> None:
        """End all connections; new ones are taken."""
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

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
                server = socket.create_connection(self._target)
                self._sockets += [client, server]
                for ends in ((client, server, "sent"), (server, client, "answered")):
                    thread = threading.Thread(target=self._pass_on, args=ends)
                    self._threads.append(thread)
                    thread.start()

    def _pass_on(self, source: socket.socket, target: socket.socket, counter: str) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 18):
                target.sendall(data)
                with self._changed:
                    setattr(self, counter, getattr(self, counter) + len(data))
                    self._changed.notify_all()
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@contextmanager
def relay(target: str) -> Iterator[Relay]:
    """Relay to ``target`` for as long as the block runs."""
    running = Relay(target)
    try:
        yield running
    finally:
        running.close()
