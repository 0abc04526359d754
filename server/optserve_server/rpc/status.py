"""Errors of the core as gRPC statuses: the one table, and the only place that translates."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from optserve.reasons import DOMAIN, reason_name
from optserve.v1.error_pb2 import Reason, Refusal
from optserve_server.core import errors

_CALLER = grpc.StatusCode.INVALID_ARGUMENT
_STATE = grpc.StatusCode.FAILED_PRECONDITION
_LIMIT = grpc.StatusCode.RESOURCE_EXHAUSTED

_Row = tuple[grpc.StatusCode, Reason.ValueType]

STATUS: dict[type[errors.OptserveError], _Row] = {
    errors.MalformedMessageError: (_CALLER, Reason.REASON_MALFORMED_MESSAGE),
    errors.UnknownFieldError: (_CALLER, Reason.REASON_UNKNOWN_FIELD),
    errors.MissingFieldError: (_CALLER, Reason.REASON_MISSING_FIELD),
    errors.InvalidFieldError: (_CALLER, Reason.REASON_INVALID_FIELD),
    errors.InvalidNameError: (_CALLER, Reason.REASON_INVALID_NAME),
    errors.UnknownNameError: (_CALLER, Reason.REASON_UNKNOWN_NAME),
    errors.InvalidHyperparameterError: (_CALLER, Reason.REASON_INVALID_HYPERPARAMETER),
    errors.InvalidExpressionError: (_CALLER, Reason.REASON_INVALID_EXPRESSION),
    errors.ShapeMismatchError: (_CALLER, Reason.REASON_SHAPE_MISMATCH),
    errors.DataTypeMismatchError: (_CALLER, Reason.REASON_DATA_TYPE_MISMATCH),
    errors.ByteCountMismatchError: (_CALLER, Reason.REASON_BYTE_COUNT_MISMATCH),
    errors.ChunkOutOfOrderError: (_CALLER, Reason.REASON_CHUNK_OUT_OF_ORDER),
    errors.EventOutOfOrderError: (_CALLER, Reason.REASON_EVENT_OUT_OF_ORDER),
    errors.NonFiniteGradientError: (_CALLER, Reason.REASON_NON_FINITE_GRADIENT),
    errors.NoGradientError: (_CALLER, Reason.REASON_NO_GRADIENT),
    errors.TargetOutOfRangeError: (_CALLER, Reason.REASON_TARGET_OUT_OF_RANGE),
    errors.SessionNotFoundError: (grpc.StatusCode.NOT_FOUND, Reason.REASON_SESSION_NOT_FOUND),
    errors.ParametersNotSetError: (_STATE, Reason.REASON_PARAMETERS_NOT_SET),
    errors.LossNotSetError: (_STATE, Reason.REASON_LOSS_NOT_SET),
    errors.StepOutOfOrderError: (grpc.StatusCode.OUT_OF_RANGE, Reason.REASON_STEP_OUT_OF_ORDER),
    errors.EpochOutOfOrderError: (grpc.StatusCode.OUT_OF_RANGE, Reason.REASON_EPOCH_OUT_OF_ORDER),
    errors.EpochEmptyError: (_STATE, Reason.REASON_EPOCH_EMPTY),
    errors.WorkerBusyError: (grpc.StatusCode.ALREADY_EXISTS, Reason.REASON_WORKER_BUSY),
    errors.RoundTimeoutError: (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.REASON_ROUND_TIMEOUT),
    errors.ScheduleFailedError: (_STATE, Reason.REASON_SCHEDULE_FAILED),
    errors.SessionFailedError: (grpc.StatusCode.DATA_LOSS, Reason.REASON_SESSION_FAILED),
    errors.SessionDeletedError: (grpc.StatusCode.ABORTED, Reason.REASON_SESSION_DELETED),
    errors.SessionDamagedError: (grpc.StatusCode.DATA_LOSS, Reason.REASON_SESSION_DAMAGED),
    errors.JournalForeignError: (_STATE, Reason.REASON_JOURNAL_FOREIGN),
    errors.NoStorageError: (_STATE, Reason.REASON_NO_STORAGE),
    errors.CheckpointNotFoundError: (
        grpc.StatusCode.NOT_FOUND,
        Reason.REASON_CHECKPOINT_NOT_FOUND,
    ),
    errors.CheckpointExistsError: (
        grpc.StatusCode.ALREADY_EXISTS,
        Reason.REASON_CHECKPOINT_EXISTS,
    ),
    errors.StalledError: (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.REASON_STALLED),
    errors.StepConflictError: (grpc.StatusCode.ABORTED, Reason.REASON_STEP_CONFLICT),
    errors.RequestConflictError: (grpc.StatusCode.ALREADY_EXISTS, Reason.REASON_REQUEST_CONFLICT),
    errors.SeatTakenOverError: (grpc.StatusCode.ABORTED, Reason.REASON_SEAT_TAKEN_OVER),
    errors.TooManyError: (_LIMIT, Reason.REASON_TOO_MANY),
    errors.MemoryExhaustedError: (_LIMIT, Reason.REASON_MEMORY_EXHAUSTED),
    errors.RateExceededError: (_LIMIT, Reason.REASON_RATE_EXCEEDED),
    errors.StorageExhaustedError: (_LIMIT, Reason.REASON_STORAGE_FULL),
    errors.LimitExceededError: (_LIMIT, Reason.REASON_LIMIT_EXCEEDED),
    errors.UnauthenticatedError: (grpc.StatusCode.UNAUTHENTICATED, Reason.REASON_UNAUTHENTICATED),
    errors.DrainingError: (grpc.StatusCode.UNAVAILABLE, Reason.REASON_DRAINING),
}  # fmt: skip
"""Status code and reason of every leaf of the error tree; a test proves it total."""

# A status travels in the trailers, of which peers take 8 KiB in all: the message twice, once of
# them in base64 and once with three characters for a byte; a description; and three facts.
_MESSAGE_BYTES_MAX = 768
_FACT_BYTES_MAX = 384


def reason_of(error: errors.OptserveError) -> str:
    """Return the name of the error's reason: ``SHAPE_MISMATCH``."""
    return reason_name(STATUS[type(error)][1])


def refusal(error: errors.OptserveError) -> Refusal:
    """Return the error as a message, for a stream that goes on."""
    code, reason = STATUS[type(error)]
    number: int = code.value[0]
    return Refusal(
        code=number,
        reason=reason,
        message=error.message,
        field=error.field,
        expected=error.expected,
        actual=error.actual,
        retry_after=None if error.retry_after_s is None else _duration(error.retry_after_s),
    )


def end(context: grpc.aio.ServicerContext[Any, Any], error: errors.OptserveError) -> None:
    """Let the call end, once its handler returns, with the error's status and its facts as details.

    Not by raising: gRPC keeps what is raised to end a call, and with it the frames that it came
    through and the request's tensors, until Python looks for cycles. 200 refused requests of 2 MiB
    took 900 MiB.
    """
    _end(context, _status(error))


def end_internal(context: grpc.aio.ServicerContext[Any, Any], request_id: str) -> None:
    """Let the call end as our fault: the log knows the rest under ``request_id``."""
    message = f"internal error; the server's log has it as request {request_id}"
    reason = reason_name(Reason.REASON_INTERNAL)
    facts = {"request_id": request_id}
    _end(context, _rich(grpc.StatusCode.INTERNAL, message, reason, facts, []))


async def abort(
    context: grpc.aio.ServicerContext[Any, Any], error: errors.OptserveError
) -> NoReturn:
    """End the call at once, where others have its handler; see end()."""
    status = _status(error)
    await context.abort(status.code, status.details, status.trailing_metadata)


def _end(context: grpc.aio.ServicerContext[Any, Any], status: Any) -> None:  # noqa: ANN401 # untyped
    context.set_code(status.code)
    context.set_details(status.details)
    context.set_trailing_metadata(status.trailing_metadata)


def _status(error: errors.OptserveError) -> Any:  # noqa: ANN401 # grpc_status is untyped.
    code, reason = STATUS[type(error)]
    facts = {"field": error.field, "expected": error.expected, "actual": error.actual}
    return _rich(code, error.message, reason_name(reason), facts, _details(error))


def _rich(
    code: grpc.StatusCode, message: str, reason: str, facts: dict[str, str], details: list[Any]
) -> Any:  # noqa: ANN401 # As above.
    info = error_details_pb2.ErrorInfo(
        reason=reason,
        domain=DOMAIN,
        metadata={name: _short(fact, _FACT_BYTES_MAX) for name, fact in facts.items() if fact},
    )
    rich = status_pb2.Status(code=code.value[0], message=_short(message, _MESSAGE_BYTES_MAX))
    for detail in (info, *details):
        packed = AnyMessage()
        packed.Pack(detail)
        rich.details.append(packed)
    return rpc_status.to_status(rich)


def _details(error: errors.OptserveError) -> list[Any]:
    details: list[Any] = []
    description = _short(error.message, _FACT_BYTES_MAX)
    if isinstance(error, errors.CallerError) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_short(error.field, _FACT_BYTES_MAX), description=description
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, errors.LimitError):
        quota = error_details_pb2.QuotaFailure.Violation(
            subject=error.field or "server", description=description
        )
        details.append(error_details_pb2.QuotaFailure(violations=[quota]))
    if error.retry_after_s is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=_duration(error.retry_after_s)))
    return details


def _short(text: str, bytes_max: int) -> str:
    """Return the beginning of a text that is too long."""
    data = text.encode()
    return text if len(data) <= bytes_max else data[:bytes_max].decode(errors="ignore") + "..."


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
