"""Numbers that both sides must know before they have met; every other limit comes from GetServerInfo."""

CHUNK_BYTES_MAX = 1 << 20  # 1 MiB: a quarter of gRPC's default limit of 4 MiB; copies stay in cache.

MESSAGE_BYTES_MAX = 4 << 20  # gRPC's default limit in every language; finite, or a bomb would be inflated whole.

MESSAGE_HEADROOM_BYTES = 64 << 10  # What a message may hold beside tensor data: names, shapes, field tags.
