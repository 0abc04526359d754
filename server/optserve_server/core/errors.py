"""What can be refused, and whose mistake it is.

    OptserveError
    ├── CallerError                the caller's mistake: sending it again is refused again
    │   ├── MalformedMessageError      bytes that are no message
    │   ├── UnknownFieldError          a field that would otherwise be dropped silently
    │   ├── MissingFieldError          a required field is not set
    │   ├── InvalidFieldError          a value that is not allowed
    │   ├── InvalidNameError           empty, too long, with control characters, or there twice
    │   ├── UnknownNameError           no parameter, or no group, of this session
    │   ├── InvalidHyperparameterError a value that torch does not take
    │   ├── InvalidExpressionError     more than arithmetic, too long, or without a finite value
    │   ├── ShapeMismatchError
    │   ├── DataTypeMismatchError
    │   ├── ByteCountMismatchError
    │   ├── ChunkOutOfOrderError       a gap, an overlap, or a tensor that was not announced
    │   ├── EventOutOfOrderError       a stream's events in an order that they may not have
    │   ├── NonFiniteGradientError
    │   ├── NoGradientError            nobody brought a gradient to the step
    │   └── TargetOutOfRangeError      no class, or no probability
    ├── SessionStateError          ask where the session stands, and go on from there
    │   ├── SessionNotFoundError
    │   ├── ParametersNotSetError
    │   ├── LossNotSetError
    │   ├── StepOutOfOrderError
    │   ├── EpochOutOfOrderError
    │   ├── EpochEmptyError
    │   ├── WorkerBusyError            another call is sending for this worker
    │   ├── RoundTimeoutError          the other workers did not come in time
    │   ├── ScheduleFailedError        the expression has no finite value for the next count
    │   ├── SessionFailedError         a fault of the server left the session half changed
    │   ├── SessionDeletedError
    │   ├── SessionDamagedError        what is on disk of it is not what was written there
    │   ├── JournalForeignError        another torch, or another device, wrote its journal
    │   ├── NoStorageError             the server keeps sessions in memory only
    │   ├── StalledError               the client neither sent nor read in the middle of a transfer
    │   ├── StepConflictError          the step's number was used with other content
    │   ├── RequestConflictError       the request's id was used for another request
    │   └── SeatTakenOverError         the same client sends for this worker on another stream
    ├── LimitError                 do what the message says
    │   ├── TooManyError
    │   ├── MemoryExhaustedError
    │   ├── StorageExhaustedError      the disk has no room for what would make a change durable
    │   ├── RateExceededError          too many calls in too short a time
    │   └── LimitExceededError
    ├── UnauthenticatedError       the caller does not show who it is
    └── DrainingError              the server is about to stop

Everything else that is raised is the server's own fault, and never shown to a client.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class OptserveError(Exception):
    """A refusal: the message for a person, and the facts for a machine."""

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        expected: object = "",
        actual: object = "",
        retry_after_s: float | None = None,
    ) -> None:
        """Refuse.

        Args:
            message: What is wrong and, unless it is plain, what to do; shown to the client.
            field: Path of the field at fault, as the contract names it: ``gradients[2].shape``.
            expected: What would have been right.
            actual: What came.
            retry_after_s: When the same may work. None: not by waiting.
        """
        super().__init__(message)
        self.message = message
        self.field = field
        self.expected = str(expected)
        self.actual = str(actual)
        self.retry_after_s = retry_after_s


@contextmanager
def within(path: str) -> Iterator[None]:
    """Put ``path`` before the field of whatever is refused in the block."""
    try:
        yield
    except OptserveError as error:
        if error.field:
            error.field = f"{path}.{error.field}"
        raise


class CallerError(OptserveError):
    """The caller's mistake."""


class MalformedMessageError(CallerError):
    """The bytes are no message of the expected type."""


class UnknownFieldError(CallerError):
    """The message carries a field that this server does not know."""


class MissingFieldError(CallerError):
    """A required field is not set."""


class InvalidFieldError(CallerError):
    """A field has a value that is not allowed."""


class InvalidNameError(CallerError):
    """A name is empty, too long, holds control characters, or stands twice."""


class UnknownNameError(CallerError):
    """A name is no parameter, or no group, of the session."""


class InvalidHyperparameterError(CallerError):
    """A hyperparameter has a value that is not allowed, or that does not go with the others."""


class InvalidExpressionError(CallerError):
    """An expression reaches for more than arithmetic, is too long, or has no finite value."""


class ShapeMismatchError(CallerError):
    """A tensor has another shape than it must have."""


class DataTypeMismatchError(CallerError):
    """A tensor has another data type than it must have."""


class ByteCountMismatchError(CallerError):
    """A tensor got fewer or more bytes than it has."""


class ChunkOutOfOrderError(CallerError):
    """A chunk leaves a gap, overlaps, or belongs to no announced tensor."""


class EventOutOfOrderError(CallerError):
    """The events of a stream came in an order that they may not have."""


class NonFiniteGradientError(CallerError):
    """A gradient holds a NaN or an infinity."""


class NoGradientError(CallerError):
    """No worker brought a gradient to the step."""


class TargetOutOfRangeError(CallerError):
    """A target is no class, or no probability."""


class SessionStateError(OptserveError):
    """The session's state does not allow it."""


class SessionNotFoundError(SessionStateError):
    """There is no such session."""


class ParametersNotSetError(SessionStateError):
    """Not every parameter has a value."""


class LossNotSetError(SessionStateError):
    """The session has no loss."""


class StepOutOfOrderError(SessionStateError):
    """The step's number is neither the next one nor the last one."""


class EpochOutOfOrderError(SessionStateError):
    """The epoch's number is neither the next one nor the last one."""


class EpochEmptyError(SessionStateError):
    """The epoch has no step."""


class WorkerBusyError(SessionStateError):
    """Another call is sending for this worker."""


class RoundTimeoutError(SessionStateError):
    """The other workers did not come in time."""


class ScheduleFailedError(SessionStateError):
    """The expression of the schedule has no finite value for the next count."""


class SessionFailedError(SessionStateError):
    """A fault of the server left the session half changed."""


class SessionDeletedError(SessionStateError):
    """The session was deleted while the call was going on."""


class SessionDamagedError(SessionStateError):
    """What is on disk of the session, or of the checkpoint, is not what was written there."""


class JournalForeignError(SessionStateError):
    """The session's journal was written with another torch, or on another device."""


class NoStorageError(SessionStateError):
    """The server keeps sessions in memory only."""


class CheckpointNotFoundError(SessionStateError):
    """There is no such checkpoint."""


class CheckpointExistsError(SessionStateError):
    """The session has a checkpoint of this name, of another state."""


class StalledError(SessionStateError):
    """The client neither sent nor read in the middle of a transfer."""


class StepConflictError(SessionStateError):
    """The step's number was used with other content."""


class RequestConflictError(SessionStateError):
    """The request's id was used for another request."""


class SeatTakenOverError(SessionStateError):
    """The same client sends for this worker on another stream."""


class LimitError(OptserveError):
    """A limit of the server."""


class TooManyError(LimitError):
    """As many as allowed are there already."""


class MemoryExhaustedError(LimitError):
    """No memory is left for it."""


class RateExceededError(LimitError):
    """Too many calls were begun in too short a time."""


class StorageExhaustedError(LimitError):
    """The disk has no room for what would make a change durable."""


class LimitExceededError(LimitError):
    """It is larger than allowed."""


class UnauthenticatedError(OptserveError):
    """The caller does not show who it is."""


class DrainingError(OptserveError):
    """The server is about to stop."""


def draining_error() -> DrainingError:
    """Return what new work is refused with while the server drains."""
    return DrainingError(
        "the server is about to stop; try again, here or elsewhere", retry_after_s=5.0
    )
