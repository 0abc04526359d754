"""Refusals as tests see them, whichever way they came."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from optserve.reasons import DOMAIN, reason_name
from optserve.v1.error_pb2 import Refusal
from optserve_server.core.errors import OptserveError
from optserve_server.rpc import status

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class RefusedError(Exception):
    """Something was refused."""

    def __init__(self, code: grpc.StatusCode, message: str, facts: dict[str, str]) -> None:
        super().__init__(f"{facts.get('reason', '')} {facts.get('field', '')}: {message}")
        self.code = code
        self.message = message
        self.reason = facts.get("reason", "")
        self.field = facts.get("field", "")
        self.expected = facts.get("expected", "")
        self.actual = facts.get("actual", "")
        self.request_id = facts.get("request_id", "")
        self.retry_after_s = float(facts["retry_after_s"]) if "retry_after_s" in facts else None

    @classmethod
    def from_call(cls, error: grpc.RpcError) -> RefusedError:
        """Return what ended a call; without a reason if it was not an optserve that ended it."""
        call = cast("grpc.Call", error)  # What the stubs raise is both.
        rich = rpc_status.from_call(call)
        facts: dict[str, str] = {}
        for packed in rich.details if rich else ():
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if packed.Unpack(info):
                assert info.domain == DOMAIN
                facts |= {"reason": info.reason, **info.metadata}
            elif packed.Unpack(retry):
                facts["retry_after_s"] = str(retry.retry_delay.ToTimedelta().total_seconds())
        return cls(call.code(), call.details() or "", facts)

    @classmethod
    def from_message(cls, refusal: Refusal) -> RefusedError:
        """Return what a stream says of one of its steps."""
        facts = {
            "reason": reason_name(refusal.reason),
            "field": refusal.field,
            "expected": refusal.expected,
            "actual": refusal.actual,
        }
        if refusal.HasField("retry_after"):
            facts["retry_after_s"] = str(refusal.retry_after.ToTimedelta().total_seconds())
        return cls(_CODES[refusal.code], refusal.message, facts)

    @classmethod
    def from_error(cls, error: OptserveError) -> RefusedError:
        """Return what the core raises."""
        return cls.from_message(status.refusal(error))


@contextmanager
def translated() -> Iterator[None]:
    """Raise refusals of calls and of the core as RefusedError."""
    try:
        yield
    except grpc.RpcError as error:
        raise RefusedError.from_call(error) from error
    except OptserveError as error:
        raise RefusedError.from_error(error) from error


@contextmanager
def refused(
    reason: str, *, field: str | None = None
) -> Iterator[pytest.ExceptionInfo[RefusedError]]:
    """Make sure that the block is refused for this reason and, if it is given, with this field."""
    with pytest.raises(RefusedError) as caught:
        yield caught
    error = caught.value
    assert error.reason == reason, error
    if field is not None:
        assert error.field == field, error
