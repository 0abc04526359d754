"""How a client talks to its server."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from optserve.limits import CHUNK_BYTES_MAX

Lane: TypeAlias = Literal["auto", "grpc", "shm"]
"""How the tensors of steps travel: over gRPC ("grpc"), not at all, being in memory that the server
shares ("shm"), or not at all if that can be had, and else over gRPC ("auto")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Deadlines and sizes. Every call has a deadline; after it the caller gets a DeadlineError.

    Raises:
        ValueError: A time is not a positive number, ``chunk_bytes`` is not between 1 and 1 MiB, or
            there is no such ``lane``.
    """

    connect_timeout_s: float = 10.0
    """Until the server has given its first answer."""
    timeout_s: float = 60.0
    """For a call that moves no more than a message each way."""
    step_timeout_s: float = 660.0
    """For one step, with its tensors and with the wait for other workers. Should be longer than the
    server's own ``round_timeout_s``, by default 600, whose refusal says more than silence."""
    transfer_timeout_s: float = 600.0
    """For an upload, a download, or the evaluation of a loss whose tensors need a stream."""
    chunk_bytes: int = CHUNK_BYTES_MAX
    """Most tensor bytes in one message; less if the server allows less."""
    lane: Lane = "auto"
    """How the tensors of steps travel. A server shares memory with clients of its user on its host;
    with "shm" a step on the stream raises SharedMemoryError where that is not so."""

    def __post_init__(self) -> None:
        for name in ("connect_timeout_s", "timeout_s", "step_timeout_s", "transfer_timeout_s"):
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"{name} must be a positive number of seconds, not {seconds!r}")
        if not 1 <= self.chunk_bytes <= CHUNK_BYTES_MAX:
            raise ValueError(
                f"chunk_bytes must be between 1 and {CHUNK_BYTES_MAX}, not {self.chunk_bytes!r}"
            )
        if self.lane not in get_args(Lane):
            raise ValueError(f"lane must be one of {get_args(Lane)}, not {self.lane!r}")
