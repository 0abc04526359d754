"""How a client talks to its server."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self, TypeAlias, get_args

from optserve.limits import CHUNK_BYTES_MAX

Lane: TypeAlias = Literal["auto", "grpc", "shm"]
"""How the tensors of steps travel: over gRPC ("grpc"), not at all, being in memory that the server
shares ("shm"), or not at all if that can be had, and else over gRPC ("auto")."""


Token: TypeAlias = str | Path | Callable[[], str]
"""A bearer token; or the file that holds it, which is read again once it has changed; or what
returns it, at once and from any thread. Asked for at every call, so that it can be exchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How long a call that came to nothing is tried again, if that is safe; see the README.

    The waits grow, and part of each is left to chance: clients that were cut off together do not
    come back together. A server that says when to come back is not asked before.

    Raises:
        ValueError: A number is not what it must be.
    """

    give_up_after_s: float = 120.0
    """How long after its first failure the last attempt of a call may begin. A restart of the
    server fits in, with the sessions that it finds on its disk.

    Each call has all of it, and so has each step: an outage that has ended with an answer does not
    count for the next one. Nor does, in one step, the time for which its stream was open, waiting
    for other workers perhaps."""
    backoff_s: float = 0.1
    """The first wait."""
    backoff_factor: float = 2.0
    """How much longer each wait is than the one before."""
    backoff_max_s: float = 5.0
    """The longest wait."""
    jitter: float = 0.5
    """Share of a wait that is left to chance, from 0 to 1."""

    def __post_init__(self) -> None:
        _check_seconds(self, "give_up_after_s", "backoff_s", "backoff_max_s", zero=True)
        if not (math.isfinite(self.backoff_factor) and self.backoff_factor >= 1):
            raise ValueError(f"backoff_factor must be at least 1, not {self.backoff_factor!r}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter must be from 0 to 1, not {self.jitter!r}")

    @classmethod
    def never(cls) -> Self:
        """Return what tries nothing again."""
        return cls(give_up_after_s=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """An encrypted connection, to a server that proves who it is.

    The files are PEM, and read when a client connects.

    Raises:
        ValueError: There is a certificate without a key, or a key without a certificate.
    """

    ca: str | Path | None = None
    """Of whoever has signed the server's certificate. None: those whom gRPC trusts."""
    certificate: str | Path | None = None
    """Of this client, with what leads up to its issuer, for a server that asks for one."""
    key: str | Path | None = None
    """That belongs to ``certificate``."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key are of use only together")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Deadlines, sizes, patience, identity. Every call has a deadline, and then a DeadlineError.

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
    retry: Retry = field(default_factory=Retry)
    """What happens when the connection breaks, or the server asks to come back later."""
    keepalive_s: float = 45.0
    """How long the server may be silent in a call before it is asked whether it is there; if it is
    silent for as long again, at most 20 s, the connection counts as broken. Servers take much less
    than the default for an attack."""
    tls: Tls | None = None
    """None: nothing is encrypted."""
    token: Token | None = field(default=None, repr=False)
    """Who this client is. None: nobody in particular."""
    allow_plaintext_token: bool = False
    """Whether the token may be sent where anybody on the way can read it: without TLS, to another
    host."""

    def __post_init__(self) -> None:
        _check_seconds(
            self,
            *("connect_timeout_s", "timeout_s", "step_timeout_s", "transfer_timeout_s"),
            "keepalive_s",
        )
        if not 1 <= self.chunk_bytes <= CHUNK_BYTES_MAX:
            raise ValueError(
                f"chunk_bytes must be between 1 and {CHUNK_BYTES_MAX}, not {self.chunk_bytes!r}"
            )
        if self.lane not in get_args(Lane):
            raise ValueError(f"lane must be one of {get_args(Lane)}, not {self.lane!r}")


def _check_seconds(config: object, *names: str, zero: bool = False) -> None:
    for name in names:
        seconds = getattr(config, name)
        if not (math.isfinite(seconds) and (seconds > 0 or (zero and seconds == 0))):
            raise ValueError(f"{name} must be a positive number of seconds, not {seconds!r}")
