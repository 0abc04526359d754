"""Numbers that both sides must know before they have met.

Every other limit comes from GetServerInfo.
"""

from __future__ import annotations

CHUNK_BYTES_MAX = 1 << 20  # 1 MiB: a quarter of gRPC's default limit; copies stay in cache.

MESSAGE_BYTES_MAX = (
    4 << 20
)  # gRPC's default in every language. Finite, or bombs are inflated whole.

MESSAGE_HEADROOM_BYTES = (
    64 << 10
)  # For what a message holds beside tensor data: names, shapes, tags.
