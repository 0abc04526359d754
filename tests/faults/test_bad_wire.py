"""The wire that does harm does the harm that it is told to, and no other."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from bad_wire import BadWire, End, Fate, bad_wire

CONTENT = bytes(range(256)) * 400
CUT_AFTER = 12_345
TIMEOUT_S = 20


@contextmanager
def _echo() -> Iterator[str]:
    """Answer every connection with what comes on it."""

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)
            except OSError:
                pass

    def accept() -> None:
        try:
            while True:
                threading.Thread(target=answer, args=[listener.accept()[0]]).start()
        except OSError:
            pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept)
        accepting.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    accepting.join()


@contextmanager
def _connected(fate: Fate) -> Iterator[tuple[socket.socket, BadWire]]:
    with _echo() as target, bad_wire(target, lambda _number: fate) as wire:
        host, _, port = wire.address.rpartition(":")
        with socket.create_connection((host, int(port)), TIMEOUT_S) as client:
            yield client, wire


def _exchange(client: socket.socket) -> bytes:
    """Send the content and half-close; return what comes back before the end or a reset."""
    sending = threading.Thread(target=_send, args=[client])
    sending.start()
    came = bytearray()
    try:
        while data := client.recv(1 << 16):
            came += data
    except ConnectionResetError:
        came += b"RESET"
    sending.join()
    return bytes(came)


def _send(client: socket.socket) -> None:
    try:
        client.sendall(CONTENT)
        client.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.mark.parametrize(
    "fate",
    [
        pytest.param(Fate(), id="nothing"),
        pytest.param(Fate(slice_bytes_max=50), id="slices"),
        pytest.param(Fate(latency_s=0.01), id="latency"),
        pytest.param(Fate(end=End.RESET, end_after_bytes=10**9), id="end-that-is-far"),
    ],
)
def test_everything_arrives_where_nothing_ends(fate: Fate) -> None:
    with _connected(fate) as (client, wire):
        assert _exchange(client) == CONTENT
        assert not wire.ended


def test_bandwidth_is_bounded() -> None:
    with _connected(Fate(bytes_per_s=400_000)) as (client, _wire):
        started_s = time.monotonic()
        assert _exchange(client) == CONTENT
        assert time.monotonic() - started_s >= len(CONTENT) / 400_000


@pytest.mark.parametrize("end", End)
def test_connection_ends_downward_at_the_very_byte(end: End) -> None:
    fate = Fate(end=end, end_after_bytes=CUT_AFTER, end_upward=False, stall_s=0.2)
    with _connected(fate) as (client, wire):
        came = _exchange(client)
        if end is End.RESET:  # It may overtake what has arrived, and has not been read.
            assert came.removesuffix(b"RESET") == CONTENT[: len(came) - len(b"RESET")]
            assert len(came) <= CUT_AFTER + len(b"RESET")
        else:
            assert came.removesuffix(b"RESET") == CONTENT[:CUT_AFTER]
        assert came.endswith(b"RESET") == (end in {End.RESET, End.STALL})
    assert wire.ended == {end: 1}


@pytest.mark.parametrize("end", End)
def test_connection_ends_upward(end: End) -> None:
    fate = Fate(end=end, end_after_bytes=CUT_AFTER, stall_s=0.2)
    with _connected(fate) as (client, wire):
        came = _exchange(client).removesuffix(b"RESET")
        assert came == CONTENT[: len(came)]
        assert len(came) <= CUT_AFTER
    assert wire.ended == {end: 1}
