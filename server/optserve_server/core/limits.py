"""What the server allows.

Every limit is in the configuration, told to clients, checked before memory is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

WINDOW_BYTES = 8 * MIB
"""How much of a call may come that nobody has asked for yet, by default: some chunks, so that a
sender need not wait for each of them to be taken. No limit to be refused by: HTTP/2 has a client
wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits in force; the same names as in the contract, which says what they mean."""

    sessions_max: int = 1_000
    streams_max: int = 4_096
    calls_max: int = 512  # Twice workers_max: a session's workers may all wait in Step.
    request_rate_max: float = 0.0  # Whoever has one tenant has nobody to be fair to.
    tenant_sessions_max: int = 0
    tenant_bytes_max: int = 0
    tenant_disk_bytes_max: int = 0
    journal_bytes_max: int = GIB  # A restart reads so much again; a disk does it in seconds.
    park_timeout_s: float = 3_600.0  # An hour: whoever trains is back by then, or has gone home.
    memory_bytes_max: int = 8 * GIB
    session_bytes_max: int = 8 * GIB
    loss_bytes_max: int = GIB
    message_bytes_max: int = 4 * MIB  # gRPC's default in every language.
    chunk_bytes_max: int = MIB  # A quarter of it; copies stay in cache.
    parameters_max: int = 10_000
    groups_max: int = 100
    workers_max: int = 256
    dimensions_max: int = 16
    elements_max: int = 1_000
    name_bytes_max: int = 256
    digest_bytes_max: int = 32  # As long as SHA-256 and BLAKE3 are.
    request_id_bytes_max: int = 64  # A UUID has 36.
    expression_chars_max: int = 256
    expression_nodes_max: int = 64
    loss_points_max: int = 10_000
    checkpoints_max: int = 1_000  # Of a tenant. So many facts are kept in memory, some 1 KiB each.
    round_timeout_s: float = 600.0
    stall_timeout_s: float = 60.0
    transfer_rate_min: float = 256.0 * KIB  # 2 Mbit/s: training over less makes no sense.
    idle_timeout_s: float = 86_400.0  # A day: whoever trains comes back within it.
