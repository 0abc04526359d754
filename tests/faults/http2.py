"""A gRPC call by hand, for bytes that no gRPC library would send."""

from __future__ import annotations

import socket
import struct
import zlib
from collections.abc import Iterator

import h2.config
import h2.connection
import h2.events

TIMEOUT_S = 30.0
MIB = 1 << 20


def call(address: str, method: str, body: bytes, *headers: tuple[str, str]) -> dict[str, str]:
    """Send a request's body as it is, and return the headers and trailers of the answer.

    Args:
        address: Of the server.
        method: Full name, with slashes.
        body: Framed messages: see ``framed``.
        headers: Beside those that every gRPC call has.
    """
    answer: dict[str, str] = {}
    with connected_to(address, TIMEOUT_S) as connected:
        connection = begun(method, *headers)
        unsent = memoryview(body)
        if not body:
            connection.end_stream(1)
        ended = False
        while not ended:
            unsent = _send(connection, unsent)
            connected.sendall(connection.data_to_send())
            data = connected.recv(65536)
            for event in connection.receive_data(data) if data else _closed():
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    answer |= {str(name): str(value) for name, value in event.headers}
                ended |= isinstance(
                    event,
                    h2.events.StreamEnded | h2.events.StreamReset | h2.events.ConnectionTerminated,
                )
    return answer


def connected_to(address: str, timeout_s: float) -> socket.socket:
    """Return a socket that is connected to a server, and waits so long at a time."""
    host, _, port = address.rpartition(":")
    connected = socket.create_connection((host, int(port)), timeout=timeout_s)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected


def begun(method: str, *headers: tuple[str, str]) -> h2.connection.H2Connection:
    """Return a connection that has a call's headers to send, on its stream 1; as call()."""
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    connection.send_headers(
        1,
        [
            *((":method", "POST"), (":scheme", "http"), (":path", method)),
            *((":authority", "here"), ("content-type", "application/grpc"), ("te", "trailers")),
            *headers,
        ],
    )
    return connection


def framed(message: bytes, *, compressed: bool = False, length: int | None = None) -> bytes:
    """Return a message as gRPC frames it: a flag, its length, its bytes."""
    declared = len(message) if length is None else length
    return struct.pack(">BI", compressed, declared) + message


def gzip_bomb(mebibytes: int) -> bytes:
    """Return a gzip stream, a thousandth as long, of so many mebibytes of zeros."""
    zeros = bytes(MIB)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    # After a full flush a block needs nothing of what came before it, so that it can be repeated.
    block = deflate.compress(zeros) + deflate.flush(zlib.Z_FULL_FLUSH)
    checksum = 0
    for _ in range(mebibytes):
        checksum = zlib.crc32(zeros, checksum)
    header = b"\x1f\x8b\x08" + bytes(6) + b"\xff"
    trailer = struct.pack("<II", checksum, mebibytes * MIB & 0xFFFFFFFF)
    return header + block * mebibytes + zlib.compressobj(9, zlib.DEFLATED, -15).flush() + trailer


def _send(connection: h2.connection.H2Connection, unsent: memoryview) -> memoryview:
    """Send as much as the server's windows let through; end the stream with the last of it."""
    while unsent:
        window = connection.local_flow_control_window(1)
        size = min(window, connection.max_outbound_frame_size, len(unsent))
        if size == 0:
            return unsent
        connection.send_data(1, bytes(unsent[:size]), end_stream=size == len(unsent))
        unsent = unsent[size:]
    return unsent


def _closed() -> Iterator[h2.events.Event]:
    yield h2.events.ConnectionTerminated()
