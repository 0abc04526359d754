"""What the server reports about itself while it works: the seam between it and its telemetry.

An observer is told facts, at once and in plain values; it must be quick and must not raise. Whoever
reports knows nothing of Prometheus; whoever listens knows nothing of gRPC or torch.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


class Phase(enum.StrEnum):
    """A part of a step's life, timed one by one.

    Together they are what the client waits for, less the wire.
    """

    RECEIVE = "receive"
    """From the step's begin until its last gradient byte is in place."""
    QUEUE = "queue"
    """From there until the update starts: waiting for the other workers and for a thread."""
    APPLY = "apply"
    """The update itself: guard, mean, optimizer, scheduler."""
    SEND = "send"
    """From the result until gRPC has taken the last parameter byte."""


class Direction(enum.StrEnum):
    """Which way tensor bytes went."""

    RECEIVED = "received"
    SENT = "sent"


class RpcKind(enum.StrEnum):
    """The cardinality of a call, in go-grpc-prometheus's words."""

    UNARY = "unary"
    CLIENT_STREAM = "client_stream"
    SERVER_STREAM = "server_stream"
    BIDI_STREAM = "bidi_stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcMethod:
    """A method of the service.

    Known before the first call, so that its series exist from the start.
    """

    kind: RpcKind
    service: str
    """Full name: ``optserve.v1.OptimizerService``."""
    method: str
    """Short name: ``Train``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOpened:
    """A session was created."""

    session_id: str
    tenant: str
    """Whose it is."""
    optimizer: str
    """torch's name of its optimizer: ``Adam``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepApplied:
    """A session made a step."""

    session_id: str
    optimizer: str
    """torch's name of its optimizer: ``Adam``."""
    step: int
    """Number of the step, from 1."""
    rates: Mapping[str, float]
    """Learning rate that this step used, by group."""
    gradient_norm: float
    """Euclidean norm of the gradient that was applied, over all parameters."""
    time_s: float
    """When, in seconds since the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotSaved:
    """A snapshot of a session is on disk."""

    seconds: float
    """How long it took, in the background."""
    time_s: float
    """When, in seconds since the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossEvaluated:
    """A session evaluated its loss."""

    session_id: str
    split: str
    """``train``, ``validation``, or ``none`` when it is not kept."""
    loss: float
    accuracy: float | None


class Observer(Protocol):
    """Listens. Called on the event loop's thread only."""

    def session_opened(self, event: SessionOpened) -> None:
        """A session was created."""

    def session_closed(self, event: SessionOpened) -> None:
        """A session is gone; ``event`` equals the one that it was opened with."""

    def memory_reserved(self, reserved_bytes: int) -> None:
        """Sessions, uploads and evaluations together have so much memory reserved now."""

    def step_applied(self, event: StepApplied) -> None:
        """A session made a step."""

    def step_repeated(self, optimizer: str) -> None:
        """A step of a session was sent again: answered, and not applied again."""

    def loss_evaluated(self, event: LossEvaluated) -> None:
        """A session evaluated its loss."""

    def journal_written(self, byte_count: int) -> None:
        """So many bytes were written to journals."""

    def journal_synced(self, seconds: float) -> None:
        """A change waited so long for stable storage after it had been made."""

    def snapshot_saved(self, event: SnapshotSaved) -> None:
        """A snapshot is on disk."""

    def snapshot_failed(self) -> None:
        """A snapshot cannot be saved; it is tried again."""

    def sessions_parked(self, count: int) -> None:
        """So many sessions lie on disk only."""

    def session_restored(self, seconds: float) -> None:
        """A session came back from disk, which took so long."""

    def phase_ended(self, phase: Phase, seconds: float) -> None:
        """A phase of a step took so long."""

    def bytes_moved(self, direction: Direction, count: int) -> None:
        """So many bytes of tensors came or went."""

    def refused(self, reason: str) -> None:
        """Something was refused.

        ``reason`` is a name of ``optserve.v1.Reason`` without its prefix.
        """

    def rpc_started(self, method: RpcMethod) -> None:
        """A call began."""

    def rpc_handled(self, method: RpcMethod, code: str, seconds: float) -> None:
        """A call ended.

        ``code`` is the name of its status as Go writes it: ``OK``, ``InvalidArgument``.
        """

    def message_received(self, method: RpcMethod) -> None:
        """A message of a call came in."""

    def message_sent(self, method: RpcMethod) -> None:
        """A message of a call went out."""


class NullObserver:
    """Listens to nothing."""

    def session_opened(self, event: SessionOpened) -> None:
        """Ignore it."""

    def session_closed(self, event: SessionOpened) -> None:
        """Ignore it."""

    def memory_reserved(self, reserved_bytes: int) -> None:
        """Ignore it."""

    def step_applied(self, event: StepApplied) -> None:
        """Ignore it."""

    def step_repeated(self, optimizer: str) -> None:
        """Ignore it."""

    def loss_evaluated(self, event: LossEvaluated) -> None:
        """Ignore it."""

    def journal_written(self, byte_count: int) -> None:
        """Ignore it."""

    def journal_synced(self, seconds: float) -> None:
        """Ignore it."""

    def snapshot_saved(self, event: SnapshotSaved) -> None:
        """Ignore it."""

    def snapshot_failed(self) -> None:
        """Ignore it."""

    def sessions_parked(self, count: int) -> None:
        """Ignore it."""

    def session_restored(self, seconds: float) -> None:
        """Ignore it."""

    def phase_ended(self, phase: Phase, seconds: float) -> None:
        """Ignore it."""

    def bytes_moved(self, direction: Direction, count: int) -> None:
        """Ignore it."""

    def refused(self, reason: str) -> None:
        """Ignore it."""

    def rpc_started(self, method: RpcMethod) -> None:
        """Ignore it."""

    def rpc_handled(self, method: RpcMethod, code: str, seconds: float) -> None:
        """Ignore it."""

    def message_received(self, method: RpcMethod) -> None:
        """Ignore it."""

    def message_sent(self, method: RpcMethod) -> None:
        """Ignore it."""
