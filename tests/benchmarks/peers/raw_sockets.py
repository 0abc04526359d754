"""The floor of the wire: the same bytes over plain TCP sockets, and nothing done with them.

How they flow is the option ``flow``: "duplex", both directions at once; "in-turn", the answer after
the last byte; "upload" or "download", one direction, with one byte for an answer or a question.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

import numpy as np
from benchmarks.job import BlockingPeer, Job, serving
from benchmarks.model import Tensors

PIECE_BYTES = 1 << 20
_TIMEOUT_S = 60.0


@contextmanager
def connect(job: Job) -> Iterator[RawPeer]:
    """Start a server, and connect to it."""
    with serving(job) as address:
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=_TIMEOUT_S) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield RawPeer(job, connection)


def serve(job: Job, announce: Callable[[str], None]) -> None:
    """Answer one client with the model's initial parameters, again and again."""
    values = _joined(job.model().initial())
    buffer = memoryview(bytearray(len(values)))
    with socket.create_server((job.host, 0)) as listener:
        announce(f"{job.host}:{listener.getsockname()[1]}")
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _answer(connection, values, buffer, job.options["flow"])


class RawPeer(BlockingPeer):
    """One connection."""

    def __init__(self, job: Job, connection: socket.socket) -> None:
        super().__init__(job)
        self._connection = connection
        self._flow = job.options["flow"]
        self._joined_sets = [_joined(gradients) for gradients in self.gradient_sets]
        self._buffer = memoryview(bytearray(job.model().tensor_bytes))
        if self._flow == "upload":
            self._buffer[:] = _joined(self.values)  # What comes back is one byte.
        self._number = 0

    def prepare(self, gradients: Tensors) -> None:
        self._number = next(i for i, each in enumerate(self.gradient_sets) if each is gradients)

    def step(self) -> None:
        gradients = self._joined_sets[self._number]
        match self._flow:
            case "duplex":
                _both(self._connection, gradients, self._buffer)
            case "in-turn":
                _send(self._connection, gradients)
                _receive(self._connection, self._buffer)
            case "upload":
                _send(self._connection, gradients)
                _receive(self._connection, memoryview(bytearray(1)))
            case "download":
                _send(self._connection, memoryview(b"?"))
                _receive(self._connection, self._buffer)

    def parameters(self) -> Tensors:
        flat = np.frombuffer(self._buffer, dtype=np.float32)
        ends = np.cumsum([value.size for value in self.values.values()])
        return {
            name: part.reshape(value.shape)
            for (name, value), part in zip(
                self.values.items(), np.split(flat, ends[:-1]), strict=True
            )
        }


def _answer(connection: socket.socket, values: memoryview, buffer: memoryview, flow: str) -> None:
    """Take one step after the other, until the client hangs up."""
    question = buffer[:1] if flow == "download" else buffer
    while (count := connection.recv_into(question[:PIECE_BYTES])) > 0:
        match flow:
            case "duplex":  # The answer begins once the first bytes have come.
                _both(connection, values, question[count:])
            case "upload":
                _receive(connection, question[count:])
                _send(connection, memoryview(b"!"))
            case _:
                _receive(connection, question[count:])
                _send(connection, values)


def _both(connection: socket.socket, source: memoryview, target: memoryview) -> None:
    """Send and receive at once; sockets release Python's lock."""
    sender = Thread(target=_send, args=(connection, source))
    sender.start()
    _receive(connection, target)
    sender.join()


def _send(connection: socket.socket, source: memoryview) -> None:
    for at in range(0, len(source), PIECE_BYTES):
        connection.sendall(source[at : at + PIECE_BYTES])


def _receive(connection: socket.socket, target: memoryview) -> None:
    at = 0
    while at < len(target):
        count = connection.recv_into(target[at : at + PIECE_BYTES])
        if count == 0:
            raise ConnectionError("the other side has hung up in the middle of a step")
        at += count


def _joined(tensors: Tensors) -> memoryview:
    flat = np.concatenate([tensor.reshape(-1) for tensor in tensors.values()])
    return flat.view(np.uint8).data
