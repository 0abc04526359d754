"""Everything that this package raises when a call does not succeed.

::

    OptserveError
    ├── RequestError                    the caller's mistake: the same again is refused again
    │   ├── InvalidFieldError               a field is missing, or has a value that is not allowed
    │   ├── InvalidNameError                a name is empty, too long, or stands twice
    │   ├── UnknownNameError                a name is no parameter, or no group, of the session
    │   ├── InvalidHyperparameterError      a value is not allowed, or not with the others
    │   ├── InvalidExpressionError          a schedule is more than finite arithmetic
    │   ├── ShapeMismatchError              a tensor has another shape than it must have
    │   ├── DataTypeMismatchError           a tensor has another data type than it must have
    │   ├── NonFiniteGradientError          a gradient holds a NaN or an infinity
    │   ├── NoGradientError                 no worker brought a gradient to the step
    │   └── TargetOutOfRangeError           a target is no class, or no probability, of the loss
    ├── SessionError                    the session's state: ask for it, and go on from there
    │   ├── SessionNotFoundError            there is no such session
    │   ├── SessionDeletedError             it was deleted while the call was going on
    │   ├── SessionDamagedError             the server's disk has lost it: it can only be deleted
    │   ├── JournalForeignError             another torch, or device, must replay its journal
    │   ├── NoStorageError                  the server keeps sessions in memory only
    │   ├── CheckpointNotFoundError         there is no such checkpoint
    │   ├── CheckpointExistsError           the name is that of a checkpoint of another state
    │   ├── SessionFailedError              it can only be deleted
    │   ├── ParametersNotSetError           not every parameter has a value
    │   ├── LossNotSetError                 it has no loss to evaluate
    │   ├── StepOutOfOrderError             the step is neither the next one nor the last one
    │   ├── EpochOutOfOrderError            the epoch is neither the next one nor the last one
    │   ├── EpochEmptyError                 the epoch has no step
    │   ├── WorkerBusyError                 another call is sending for this worker
    │   ├── StepsLostError                  the server has lost steps: resume, and repeat them
    │   ├── RoundTimeoutError               the other workers did not come: take the step again
    │   ├── StalledError                    this client stopped in the middle of a transfer
    │   ├── StepConflictError               the step was taken with other content
    │   ├── RequestConflictError            the request's id belongs to another request
    │   ├── SeatTakenOverError              the same client sends for this worker on another stream
    │   └── ScheduleFailedError             the schedule has no finite rate for the next count
    └── ServiceError                    the server, or the way to it
        ├── LimitError                      a limit: do what the message says
        ├── UnauthenticatedError            it does not know, or not believe, who calls
        ├── UnavailableError                nothing answers, or it is about to stop
        ├── SharedMemoryError               it was asked for, and cannot be had
        ├── DeadlineError                   no answer in time: it may have been done, or not
        ├── StepUnknownError                a step was sent, and no answer came
        ├── ClosedError                     the client, or the session object, has been closed
        ├── ProtocolError                   client and server do not understand each other
        └── InternalError                   a fault of the server

The class is chosen by the reason that the server gives, never by the text of a message.
"""

from __future__ import annotations

from typing import Self

from optserve.reasons import reason_name
from optserve.v1.error_pb2 import Reason


class OptserveError(Exception):
    """A call did not succeed.

    Attributes:
        reason: Name of the contract's Reason, such as ``"SHAPE_MISMATCH"``; empty if none was
            given.
        field: What is at fault, as a path such as ``"gradients[2].shape"``; empty if no single
            field is.
        expected: What would have been right; empty if there is no short word for it.
        actual: What came; empty if nothing did.
        code: Name of the gRPC status code, such as ``"INVALID_ARGUMENT"``; empty if no call was
            made.
        retry_after_s: Seconds after which the same is worth trying again; None if that does not
            help by itself.
        request_id: What finds a fault in the server's log; empty if it is not one.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        field: str = "",
        expected: str = "",
        actual: str = "",
        code: str = "",
        retry_after_s: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field
        self.expected = expected
        self.actual = actual
        self.code = code
        self.retry_after_s = retry_after_s
        self.request_id = request_id

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle with all attributes: errors cross process boundaries in worker pools."""
        return type(self), self.args, self.__dict__

    @classmethod
    def local(cls, message: str, *, field: str = "", expected: str = "", actual: str = "") -> Self:
        """Return the error that the server would answer with, found before anything was sent."""
        reasons = [reason for reason, error in ERROR_BY_REASON.items() if error is cls]
        reason = reason_name(reasons[0]) if len(reasons) == 1 else ""
        return cls(message, reason=reason, field=field, expected=expected, actual=actual)


class RequestError(OptserveError):
    """The caller's mistake: sending it again is refused again."""


class InvalidFieldError(RequestError):
    """A field is missing, or has a value that is not allowed."""


class InvalidNameError(RequestError):
    """A name is empty, too long, holds control characters, or stands twice."""


class UnknownNameError(RequestError):
    """A name is no parameter, or no group, of the session."""


class InvalidHyperparameterError(RequestError):
    """A hyperparameter has a value that is not allowed, or that does not go with the others."""


class InvalidExpressionError(RequestError):
    """An expression reaches for more than arithmetic, is too long, or has no finite value."""


class ShapeMismatchError(RequestError):
    """A tensor has another shape than it must have."""


class DataTypeMismatchError(RequestError):
    """A tensor has another data type than it must have, or one that no tensor can have."""


class NonFiniteGradientError(RequestError):
    """A gradient holds a NaN or an infinity, and the session does not allow it."""


class NoGradientError(RequestError):
    """No worker brought a gradient to the step."""


class TargetOutOfRangeError(RequestError):
    """A target is no class, or no probability, of the session's loss."""


class SessionError(OptserveError):
    """The session's state: ask for its status, and go on from what it says."""


class SessionNotFoundError(SessionError):
    """There is no such session."""


class SessionDeletedError(SessionError):
    """The session was deleted while the call was going on."""


class SessionFailedError(SessionError):
    """A fault of the server left the session half changed; it can only be deleted."""


class SessionDamagedError(SessionError):
    """What the server has on disk of the session, or of a checkpoint, is not what it wrote.

    It can only be deleted.
    """


class JournalForeignError(SessionError):
    """The session's journal was written with another torch, or on another device.

    Nothing is lost: it is for the server's operator to replay it.
    """


class NoStorageError(SessionError):
    """The server keeps sessions in memory only, and was asked to keep one on disk."""


class CheckpointNotFoundError(SessionError):
    """There is no such checkpoint."""


class CheckpointExistsError(SessionError):
    """The session has a checkpoint of this name, of another state."""


class ParametersNotSetError(SessionError):
    """Not every parameter has a value, or this client has not downloaded them."""


class LossNotSetError(SessionError):
    """The session has no loss."""


class StepOutOfOrderError(SessionError):
    """The step's number is neither the next one nor the last one; ``expected`` is the next one."""


class EpochOutOfOrderError(SessionError):
    """The epoch's number is neither the next one nor the last one; ``expected`` is the next one."""


class EpochEmptyError(SessionError):
    """The epoch has no step."""


class WorkerBusyError(SessionError):
    """Another call is sending for this worker."""


class RoundTimeoutError(SessionError):
    """The other workers did not come in time; take the same step again to go on waiting."""


class StalledError(SessionError):
    """The client neither sent nor read for too long in the middle of a transfer."""


class StepConflictError(SessionError):
    """The step was taken with other content; this content was not applied."""


class RequestConflictError(SessionError):
    """The request's id belongs to a session that was created from another request."""


class SeatTakenOverError(SessionError):
    """The same client has opened another stream for this worker, in the place of this one."""


class StepsLostError(SessionError):
    """The server stands before steps that it had answered: they are lost, with what they learnt.

    ``resume()`` the session, and go on with the data of step ``resumes_from``.

    Attributes:
        resumes_from: Number of the step to go on with.
        lost: How many answered steps are gone. Zero: none, but the one that was under way has to be
            computed again.
    """

    def __init__(self, message: str, *, resumes_from: int = 0, lost: int = 0) -> None:
        super().__init__(message)
        self.resumes_from = resumes_from
        self.lost = lost


class ScheduleFailedError(SessionError):
    """The expression of the schedule has no finite value for the next count."""


class ServiceError(OptserveError):
    """The server, or the way to it."""


class LimitError(ServiceError):
    """A limit of the server: do what the message says."""


class UnauthenticatedError(ServiceError):
    """The server does not know who calls: there is no token, or one that it does not accept."""


class UnavailableError(ServiceError):
    """Nothing answers at the target, the connection broke, or the server is about to stop."""


class SharedMemoryError(ServiceError):
    """The lane "shm" was asked for, and cannot be had: the message says why."""


class DeadlineError(ServiceError):
    """No answer came in time. What was asked may or may not have been done."""


class StepUnknownError(ServiceError):
    """A step was sent, and no answer came: it may have been applied, or not.

    ``contribution()`` tells; or take the same step again: the server applies it once.

    Attributes:
        step: Number of the step.
        digest: What its content is known by: see ``Contribution``.
    """

    def __init__(self, message: str, *, step: int = 0, digest: bytes = b"", code: str = "") -> None:
        super().__init__(message, code=code)
        self.step = step
        self.digest = digest


class ClosedError(ServiceError):
    """The client or the session object was closed, by this call's own process."""


class ProtocolError(ServiceError):
    """Client and server do not understand each other: a fault of one of the two libraries."""


class InternalError(ServiceError):
    """A fault of the server; ``request_id`` finds it in the server's log."""


ERROR_BY_REASON: dict[Reason.ValueType, type[OptserveError]] = {
    Reason.REASON_UNSPECIFIED: InternalError,
    Reason.REASON_MALFORMED_MESSAGE: ProtocolError,
    Reason.REASON_UNKNOWN_FIELD: ProtocolError,
    Reason.REASON_MISSING_FIELD: InvalidFieldError,
    Reason.REASON_INVALID_FIELD: InvalidFieldError,
    Reason.REASON_INVALID_NAME: InvalidNameError,
    Reason.REASON_UNKNOWN_NAME: UnknownNameError,
    Reason.REASON_INVALID_HYPERPARAMETER: InvalidHyperparameterError,
    Reason.REASON_INVALID_EXPRESSION: InvalidExpressionError,
    Reason.REASON_SHAPE_MISMATCH: ShapeMismatchError,
    Reason.REASON_DATA_TYPE_MISMATCH: DataTypeMismatchError,
    Reason.REASON_BYTE_COUNT_MISMATCH: ProtocolError,
    Reason.REASON_CHUNK_OUT_OF_ORDER: ProtocolError,
    Reason.REASON_EVENT_OUT_OF_ORDER: ProtocolError,
    Reason.REASON_NON_FINITE_GRADIENT: NonFiniteGradientError,
    Reason.REASON_NO_GRADIENT: NoGradientError,
    Reason.REASON_TARGET_OUT_OF_RANGE: TargetOutOfRangeError,
    Reason.REASON_SESSION_NOT_FOUND: SessionNotFoundError,
    Reason.REASON_PARAMETERS_NOT_SET: ParametersNotSetError,
    Reason.REASON_LOSS_NOT_SET: LossNotSetError,
    Reason.REASON_STEP_OUT_OF_ORDER: StepOutOfOrderError,
    Reason.REASON_EPOCH_OUT_OF_ORDER: EpochOutOfOrderError,
    Reason.REASON_EPOCH_EMPTY: EpochEmptyError,
    Reason.REASON_WORKER_BUSY: WorkerBusyError,
    Reason.REASON_ROUND_TIMEOUT: RoundTimeoutError,
    Reason.REASON_STALLED: StalledError,
    Reason.REASON_STEP_CONFLICT: StepConflictError,
    Reason.REASON_REQUEST_CONFLICT: RequestConflictError,
    Reason.REASON_SEAT_TAKEN_OVER: SeatTakenOverError,
    Reason.REASON_SCHEDULE_FAILED: ScheduleFailedError,
    Reason.REASON_SESSION_FAILED: SessionFailedError,
    Reason.REASON_SESSION_DELETED: SessionDeletedError,
    Reason.REASON_SESSION_DAMAGED: SessionDamagedError,
    Reason.REASON_JOURNAL_FOREIGN: JournalForeignError,
    Reason.REASON_NO_STORAGE: NoStorageError,
    Reason.REASON_CHECKPOINT_NOT_FOUND: CheckpointNotFoundError,
    Reason.REASON_CHECKPOINT_EXISTS: CheckpointExistsError,
    Reason.REASON_TOO_MANY: LimitError,
    Reason.REASON_MEMORY_EXHAUSTED: LimitError,
    Reason.REASON_LIMIT_EXCEEDED: LimitError,
    Reason.REASON_STORAGE_FULL: LimitError,
    Reason.REASON_RATE_EXCEEDED: LimitError,
    Reason.REASON_UNAUTHENTICATED: UnauthenticatedError,
    Reason.REASON_DRAINING: UnavailableError,
    Reason.REASON_INTERNAL: InternalError,
}
"""Total, says a test. Wrong framing is a ProtocolError: this library writes the chunks."""
