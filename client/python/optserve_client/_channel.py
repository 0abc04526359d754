"""How the channels of both faces are set up."""

from __future__ import annotations

from importlib.metadata import version

from optserve.limits import MESSAGE_BYTES_MAX

CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    # gRPC's defaults, written down: finite both ways, for whoever lifts them lifts the protection
    # against bombs too.
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    # A pool of its own, so that a failed connection of one client does not make the next one wait
    # for its backoff.
    ("grpc.use_local_subchannel_pool", 1),
    # Fewer, larger reads: a chunk of 1 MiB would otherwise come in many pieces.
    ("grpc.experimental.tcp_read_chunk_size", 1 << 20),
    ("grpc.experimental.tcp_max_read_chunk_size", 4 << 20),
    ("grpc.primary_user_agent", f"optserve-python/{version('optserve-client')}"),
)
"""Of every channel. Compression is off, which is gRPC's default: gradients do not compress."""

CLOSE_TIMEOUT_S = 2.0  # For the server to end a stream that we have half-closed; then we cancel it.
