from __future__ import annotations

import pickle
import re
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

import optserve_client
from optserve.reasons import DOMAIN, reason_name
from optserve.v1.error_pb2 import Reason, Refusal
from optserve_client import errors
from optserve_client._refusals import CallSite, from_grpc, from_refusal

SITE = CallSite(rpc="Step", target="host:1", timeout_s=2.5)


class EndedCall(grpc.RpcError):
    """A call that ended badly, as both faces of grpc show it."""

    def __init__(
        self, code: grpc.StatusCode, details: str, trailers: tuple[tuple[str, bytes], ...] = ()
    ) -> None:
        super().__init__()
        self._code, self._details, self._trailers = code, details, trailers

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(  # type: ignore[override]  # Pairs, as both faces have them.
        self,
    ) -> tuple[tuple[str, bytes], ...]:
        return self._trailers


def rich_status(*details: Message) -> tuple[tuple[str, bytes], ...]:
    status = Status()
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return (("grpc-status-details-bin", status.SerializeToString()),)


def classes(root: type[errors.OptserveError]) -> Iterator[type[errors.OptserveError]]:
    yield root
    for child in root.__subclasses__():
        yield from classes(child)


@pytest.mark.parametrize("reason", Reason.values(), ids=Reason.keys())
def test_every_reason_has_a_class(reason: Reason.ValueType) -> None:
    assert issubclass(errors.ERROR_BY_REASON[reason], errors.OptserveError)


def test_the_tree_that_is_drawn_is_the_tree_that_is() -> None:
    assert errors.__doc__ is not None
    drawn = {
        name: depth
        for tree, name in re.findall(r"^    ([│├└─ ]*)(\w+Error)", errors.__doc__, re.MULTILINE)
        for depth in [len(tree) // 4]
    }
    actual = {each.__name__: len(each.__mro__) - 4 for each in classes(errors.OptserveError)}
    assert drawn == actual


def test_every_error_is_exported() -> None:
    names = {each.__name__ for each in classes(errors.OptserveError)}
    assert names <= set(optserve_client.__all__)


def test_a_rich_status_becomes_the_class_of_its_reason_with_its_facts() -> None:
    facts = {"field": "gradients[0].shape", "expected": "(2,)", "actual": "(3,)"}
    info = ErrorInfo(reason="SHAPE_MISMATCH", domain=DOMAIN, metadata=facts)
    ended = EndedCall(grpc.StatusCode.INVALID_ARGUMENT, "no fit", rich_status(info))
    error = from_grpc(ended, SITE)
    assert type(error) is errors.ShapeMismatchError
    assert str(error) == "no fit"
    assert (error.reason, error.code) == ("SHAPE_MISMATCH", "INVALID_ARGUMENT")
    assert (error.field, error.expected, error.actual) == tuple(facts.values())
    assert error.retry_after_s is None


def test_a_limit_says_when_to_try_again() -> None:
    info = ErrorInfo(reason="TOO_MANY", domain=DOMAIN)
    retry = RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))
    ended = EndedCall(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", rich_status(info, retry))
    error = from_grpc(ended, SITE)
    assert type(error) is errors.LimitError
    assert error.retry_after_s == 1.5


def test_an_internal_error_carries_what_finds_it_in_the_log() -> None:
    info = ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"request_id": "abc"})
    error = from_grpc(EndedCall(grpc.StatusCode.INTERNAL, "oh", rich_status(info)), SITE)
    assert (type(error), error.request_id) == (errors.InternalError, "abc")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.LimitError),
        (grpc.StatusCode.CANCELLED, errors.ClosedError),
        (grpc.StatusCode.UNAUTHENTICATED, errors.UnauthenticatedError),
        (grpc.StatusCode.UNIMPLEMENTED, errors.ProtocolError),
        (grpc.StatusCode.UNKNOWN, errors.InternalError),
        (grpc.StatusCode.NOT_FOUND, errors.SessionError),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.RequestError),
    ],
    ids=str,
)
def test_a_status_without_a_reason_is_told_by_its_code(
    code: grpc.StatusCode, expected: type[errors.OptserveError]
) -> None:
    error = from_grpc(EndedCall(code, "details"), SITE)
    assert type(error) is expected
    assert (error.reason, error.code) == ("", code.name)


@pytest.mark.parametrize(
    "trailers",
    [
        pytest.param(rich_status(ErrorInfo(reason="X", domain="proxy.example")), id="foreign"),
        pytest.param((("grpc-status-details-bin", b"\xff\xff"),), id="broken"),
    ],
)
def test_details_that_are_not_ours_are_passed_over(
    trailers: tuple[tuple[str, bytes], ...],
) -> None:
    error = from_grpc(EndedCall(grpc.StatusCode.UNAVAILABLE, "gone", trailers), SITE)
    assert type(error) is errors.UnavailableError
    assert "host:1" in str(error)


def test_a_reason_of_a_newer_server_is_kept_and_told_by_its_code() -> None:
    info = ErrorInfo(reason="FROM_THE_FUTURE", domain=DOMAIN)
    ended = EndedCall(grpc.StatusCode.FAILED_PRECONDITION, "later", rich_status(info))
    error = from_grpc(ended, SITE)
    assert (type(error), error.reason) == (errors.SessionError, "FROM_THE_FUTURE")


def test_a_refused_step_becomes_the_class_of_its_reason() -> None:
    refusal = Refusal(
        code=grpc.StatusCode.OUT_OF_RANGE.value[0],
        reason=Reason.REASON_STEP_OUT_OF_ORDER,
        message="step 4 is not next",
        field="step",
        expected="3",
        actual="4",
        retry_after=Duration(nanos=250_000_000),
    )
    error = from_refusal(refusal)
    assert type(error) is errors.StepOutOfOrderError
    assert (error.code, error.expected, error.retry_after_s) == ("OUT_OF_RANGE", "3", 0.25)


def test_a_refusal_with_an_unknown_reason_is_told_by_its_code() -> None:
    refusal = Refusal(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message="no")
    refusal.MergeFromString(b"\x10\xe7\x07")  # reason: 999
    error = from_refusal(refusal)
    assert (type(error), error.reason) == (errors.RequestError, "999")


def test_what_is_found_before_sending_has_the_servers_reason() -> None:
    error = errors.UnknownNameError.local("no such name", actual="v")
    assert error.reason == reason_name(Reason.REASON_UNKNOWN_NAME)
    assert error.code == ""


def test_an_error_crosses_processes_with_its_facts() -> None:
    error = errors.LimitError("full", reason="TOO_MANY", retry_after_s=2.0)
    copied = pickle.loads(pickle.dumps(error))
    assert (type(copied), str(copied)) == (errors.LimitError, "full")
    assert (copied.reason, copied.retry_after_s) == ("TOO_MANY", 2.0)
