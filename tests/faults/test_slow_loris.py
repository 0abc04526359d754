"""Connections that keep a server waiting on purpose are closed in time, and nobody else notices."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import h2.connection
import h2.events
import pytest
from faults.ground import Ground, ground
from faults.http2 import begun, connected_to, framed

from optserve.v1 import optimizer_service_pb2 as pb
from optserve_server.core.limits import Limits

STALL_S = 1.0
WAIT_S = 15.0
LOOK_S = 0.05  # How long to wait for the server at a time.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
METHOD = "/optserve.v1.OptimizerService/"


@pytest.fixture(scope="module")
def hasty() -> Iterator[tuple[Ground, str]]:
    """Serve with little patience; return the address, too."""
    with ground(Limits(stall_timeout_s=STALL_S)) as laid:
        yield laid, laid.driver._address


def _closed_after_s(connection: socket.socket, data: bytes, pause_s: float) -> float:
    """Send bytes, one at a time, and then nothing; return when the server has hung up."""
    started_s, unsent = time.monotonic(), list(data)
    while time.monotonic() - started_s < WAIT_S:
        try:
            if unsent:
                connection.sendall(bytes([unsent.pop(0)]))
                time.sleep(pause_s)
            while connection.recv(1 << 16):
                pass
            return time.monotonic() - started_s
        except TimeoutError:
            continue
        except OSError:
            return time.monotonic() - started_s
    raise AssertionError("the server goes on waiting")


@pytest.mark.parametrize(
    ("data", "pause_s"),
    [(b"", 0.0), (PREFACE, 0.3), (PREFACE, 0.0), (b"GET / HTTP/1.1\r\n", 0.3)],
    ids=["silence", "a-byte-at-a-time", "preface-then-silence", "another-protocol-slowly"],
)
def test_a_connection_that_does_not_come_about_is_closed(
    hasty: tuple[Ground, str], data: bytes, pause_s: float
) -> None:
    where, address = hasty
    before = where.look()
    with connected_to(address, LOOK_S) as connection:
        assert _closed_after_s(connection, data, pause_s) < 10 * STALL_S
    assert where.look() == before


def call_begun(method: str, data: bytes, *, end: bool) -> h2.connection.H2Connection:
    """Return a connection that has a call to send, of which some data has come, or all."""
    connection = begun(METHOD + method)
    size = connection.max_outbound_frame_size
    for at in range(0, max(len(data), 1), size):
        connection.send_data(1, data[at : at + size], end_stream=end and at + size >= len(data))
    return connection


_HALF = framed(pb.GetSessionRequest(session_id="0" * 32).SerializeToString())[:-10]
_WHOLE = framed(pb.GetCatalogueRequest().SerializeToString())
CALLS = {
    "unary-without-message": ("GetSession", b""),
    "unary-with-half-a-message": ("GetSession", _HALF),
    "unary-without-end": ("GetCatalogue", _WHOLE),
    "download-without-message": ("DownloadParameters", b""),
    "stream-without-open": ("Train", b""),
    "stream-with-half-an-open": ("Train", _HALF),
    "upload-without-begin": ("UploadParameters", b""),
    "evaluation-without-begin": ("EvaluateLossStream", b""),
}


@pytest.mark.parametrize(("method", "data"), CALLS.values(), ids=CALLS)
def test_a_call_that_does_not_come_about_is_ended(
    hasty: tuple[Ground, str], method: str, data: bytes
) -> None:
    where, address = hasty
    before = where.look()
    with connected_to(address, LOOK_S) as connected:
        connection = call_begun(method, data, end=False)
        started_s, trailers = time.monotonic(), dict[str, str]()
        while "grpc-status" not in trailers:
            assert time.monotonic() - started_s < WAIT_S, "the server goes on waiting"
            connected.sendall(connection.data_to_send())
            try:
                came = connected.recv(1 << 16)
            except TimeoutError:
                continue
            for event in connection.receive_data(came):
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    trailers |= {str(name): str(value) for name, value in event.headers}
        assert STALL_S / 2 < time.monotonic() - started_s < 10 * STALL_S
    assert trailers["grpc-status"] == "4", "DEADLINE_EXCEEDED"
    assert "neither sent nor read" in trailers["grpc-message"]
    assert where.look() == before
