"""What nobody reads is not taken, and a connection keeps little of what it has carried."""

from __future__ import annotations

import gc
import multiprocessing
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import grpc
import h2.connection
import pytest
from drivers_grpc import StubDriver, served_in_process
from faults.http2 import begun, connected_to, framed
from messages import bytes_of
from scenarios.models import create, gradients, spec

from optserve.allocator import bytes_in_use
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_pb2 import SGD

KIB, MIB = 1 << 10, 1 << 20
LOOK_S = 0.05
PATIENCE_S = 0.5  # A window that stays shut for so long is shut.
TIMEOUT_S = 30.0
SERVICE = "/optserve.v1.OptimizerService/"
CONNECTIONS, MESSAGES, MESSAGE_BYTES = 16, 4, 3 * MIB
KEPT_BYTES_MAX = MIB + 64 * KIB  # A buffer, and what is around it. gRPC's own has no bound.


@dataclass(slots=True, kw_only=True)
class _Call:
    """A call that sends what the server lets it send."""

    connected: socket.socket
    connection: h2.connection.H2Connection

    def send(self, data: bytes) -> int:
        """Send until all is sent, or the window stays shut; return how many bytes it was."""
        sent, open_s = 0, time.monotonic()
        while sent < len(data) and time.monotonic() - open_s < PATIENCE_S:
            size = self.connection.local_flow_control_window(1)
            size = min(size, self.connection.max_outbound_frame_size, len(data) - sent)
            if size:
                self.connection.send_data(1, data[sent : sent + size])
                sent, open_s = sent + size, time.monotonic()
                self.connected.sendall(self.connection.data_to_send())
            else:
                self.look()
        return sent

    def look(self) -> None:
        """Take what has come from the server."""
        self.connected.sendall(self.connection.data_to_send())
        try:
            came = self.connected.recv(1 << 16)
        except TimeoutError:
            return
        self.connection.receive_data(came)
        self.connected.sendall(self.connection.data_to_send())


@contextmanager
def _call(address: str, method: str) -> Iterator[_Call]:
    """Begin a call on a connection of its own, when the server has said what it takes."""
    connection = begun(SERVICE + method)
    with connected_to(address, LOOK_S) as connected:
        call = _Call(connected=connected, connection=connection)
        while not connection.remote_settings.initial_window_size:
            call.look()
        yield call


@pytest.mark.parametrize("window_bytes", [64 * KIB, MIB], ids=["64KiB", "1MiB"])
def test_of_what_nobody_reads_no_more_comes_than_two_windows(window_bytes: int) -> None:
    packed = pb.PackedStep(step=1, gradients=map(bytes_of, gradients(1).values()))
    with served_in_process(window_bytes=window_bytes) as address, StubDriver(address) as driver:
        session_id = create(driver, spec(SGD(lr=1), workers=2))
        events = [
            pb.TrainRequest(open=pb.TrainOpen(session_id=session_id)),
            pb.TrainRequest(packed=packed),  # Until the other worker comes, nothing else is read.
        ]
        read = b"".join(framed(event.SerializeToString()) for event in events)
        with _call(address, "Train") as call:
            sent = call.send(read + framed(bytes(4 * MIB)) * 8)
        # gRPC opens a window again for what it hands out, and does not count what is on its way.
        assert window_bytes <= sent <= len(read) + 2 * window_bytes


def test_a_connection_keeps_little_of_what_it_has_carried() -> None:
    spawning = multiprocessing.get_context("spawn")  # A process that has no threads of gRPC's yet.
    ours, theirs = spawning.Pipe()
    with served_in_process() as address:
        clients = spawning.Process(target=_carry, args=(address, theirs), daemon=True)
        clients.start()
        try:
            assert ours.recv() == "connected"
            before = _used_bytes()
            ours.send("carry")
            assert ours.recv() == "carried"
            assert _used_bytes() - before < CONNECTIONS * KEPT_BYTES_MAX
        finally:
            clients.terminate()
            clients.join()


def _carry(address: str, told: Connection[str, str]) -> None:
    """Connect, when told carry a message on each connection, and stay connected."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.insecure_channel(address, options=options) for _ in range(CONNECTIONS)]
    for channel in channels:
        grpc.channel_ready_future(channel).result(TIMEOUT_S)
    told.send("connected")
    told.recv()
    for channel in channels:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            SERVICE + "GetCatalogue"
        )
        for _ in range(MESSAGES):
            with pytest.raises(grpc.RpcError):  # It is no message of anything.
                call(b"\xff" * MESSAGE_BYTES)
    told.send("carried")
    told.recv()


def _used_bytes() -> int:
    """Return how much of the C library's memory is in use: the buffers of gRPC are."""
    gc.collect()
    used = bytes_in_use()
    assert used, "the C library does not say"
    return used
