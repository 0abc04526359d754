"""From what gRPC raises, and from the contract's Refusal, to the exceptions of this package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from optserve.reasons import DOMAIN, reason_name, reason_of
from optserve.v1.error_pb2 import Reason, Refusal
from optserve_client.errors import (
    ERROR_BY_REASON,
    ClosedError,
    DeadlineError,
    InternalError,
    LimitError,
    OptserveError,
    ProtocolError,
    RequestError,
    SessionError,
    UnauthenticatedError,
    UnavailableError,
)

_ERROR_BY_CODE: dict[str, type[OptserveError]] = {
    "CANCELLED": ClosedError,
    "INVALID_ARGUMENT": RequestError,
    "OUT_OF_RANGE": RequestError,
    "NOT_FOUND": SessionError,
    "ALREADY_EXISTS": SessionError,
    "FAILED_PRECONDITION": SessionError,
    "ABORTED": SessionError,
    "DATA_LOSS": SessionError,
    "RESOURCE_EXHAUSTED": LimitError,
    "UNAUTHENTICATED": UnauthenticatedError,
    "UNAVAILABLE": UnavailableError,
    "DEADLINE_EXCEEDED": DeadlineError,
    "UNIMPLEMENTED": ProtocolError,
}
"""For a status without a reason that we know: from gRPC itself, a proxy, or a newer server."""

_CODE_NAMES: dict[int, str] = {code.value[0]: code.name for code in grpc.StatusCode}

_DETAILS_TRAILER = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSite:
    """Where something went wrong: which rpc, of which server, under which deadline."""

    rpc: str
    target: str
    timeout_s: float


class _EndedCall(Protocol):
    """What the errors of both faces of grpc have; the stubs know the metadata of one of them."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...] | None: ...


def from_grpc(error: grpc.RpcError, site: CallSite) -> OptserveError:
    """Return the exception for a call that ended with a status other than OK."""
    call = cast("_EndedCall", error)
    code, message = call.code().name, call.details() or ""
    info, retry = _read_details(call.trailing_metadata() or ())
    if info is None:
        return _without_reason(code, message, site, retry)
    facts = info.metadata
    return _error_class(info.reason, code)(
        message,
        reason=info.reason,
        field=facts.get("field", ""),
        expected=facts.get("expected", ""),
        actual=facts.get("actual", ""),
        code=code,
        retry_after_s=_seconds(retry),
        request_id=facts.get("request_id", ""),
    )


def deadline_error(site: CallSite) -> DeadlineError:
    """Return the exception for what we ended ourselves because no answer came in time."""
    return DeadlineError(
        f"{site.rpc} at {site.target} did not end within {site.timeout_s:g} s",
        code="DEADLINE_EXCEEDED",
    )


def from_refusal(refusal: Refusal) -> OptserveError:
    """Return the exception for one step that was refused on a stream."""
    code = _CODE_NAMES.get(refusal.code, "UNKNOWN")
    reason = (
        reason_name(refusal.reason) if refusal.reason in ERROR_BY_REASON else str(refusal.reason)
    )
    return _error_class(reason, code)(
        refusal.message,
        reason=reason,
        field=refusal.field,
        expected=refusal.expected,
        actual=refusal.actual,
        code=code,
        retry_after_s=_seconds(refusal.retry_after if refusal.HasField("retry_after") else None),
    )


def _error_class(reason: str, code: str) -> type[OptserveError]:
    known = reason_of(reason)
    if known != Reason.REASON_UNSPECIFIED:
        return ERROR_BY_REASON[known]
    return _ERROR_BY_CODE.get(code, InternalError)


def _without_reason(
    code: str, details: str, site: CallSite, retry: Duration | None
) -> OptserveError:
    """Return the error of a status that no optserve server wrote, in words of our own."""
    messages = {
        "CANCELLED": f"{site.rpc} was cancelled",
        "UNAVAILABLE": f"no optserve server answers at {site.target}: {details}",
        "DEADLINE_EXCEEDED": f"{site.rpc} at {site.target} did not end within {site.timeout_s:g} s",
        "UNIMPLEMENTED": f"the server at {site.target} has no {site.rpc}: it is no optserve",
    }
    message = messages.get(code, f"{site.rpc} at {site.target} failed: {details}")
    return _ERROR_BY_CODE.get(code, InternalError)(
        message, code=code, retry_after_s=_seconds(retry)
    )


def _read_details(
    trailers: tuple[tuple[str, str | bytes], ...],
) -> tuple[ErrorInfo | None, Duration | None]:
    """Read our ErrorInfo and the RetryInfo; None where there is none that can be read."""
    info: ErrorInfo | None = None
    delay: Duration | None = None
    for key, value in trailers:
        if key != _DETAILS_TRAILER or isinstance(value, str):
            continue
        try:
            for detail in Status.FromString(value).details:
                error_info, retry_info = ErrorInfo(), RetryInfo()
                if detail.Unpack(error_info) and error_info.domain == DOMAIN:
                    info = error_info
                elif detail.Unpack(retry_info):
                    delay = retry_info.retry_delay
        except DecodeError:  # A proxy's, or broken: the code still tells what kind of error it is.
            continue
    return info, delay


def _seconds(delay: Duration | None) -> float | None:
    return None if delay is None else delay.seconds + delay.nanos / 1e9
