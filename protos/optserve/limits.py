"""Numbers that both sides must know before they have met.

Every other limit comes from GetServerInfo.
"""

from __future__ import annotations

CHUNK_BYTES_MAX = 1 << 20  # 1 MiB: a quarter of gRPC's default limit; copies stay in cache.

# gRPC's default in every language. Finite, or bombs are inflated whole.
MESSAGE_BYTES_MAX = 4 << 20

# For what a message holds beside tensor data: names, shapes, tags.
MESSAGE_HEADROOM_BYTES = 64 << 10
