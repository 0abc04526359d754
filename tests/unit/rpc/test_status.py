"""Every refusal of the core has a status and a reason, and no two mean the same."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from optserve.v1.error_pb2 import Reason
from optserve_server.core import errors
from optserve_server.rpc import status

CODES = {  # What the contract's comments say of each part of the enum.
    errors.CallerError: {grpc.StatusCode.INVALID_ARGUMENT},
    errors.LimitError: {grpc.StatusCode.RESOURCE_EXHAUSTED},
    errors.UnauthenticatedError: {grpc.StatusCode.UNAUTHENTICATED},
    errors.DrainingError: {grpc.StatusCode.UNAVAILABLE},
    errors.SessionStateError: {
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.DATA_LOSS,
        grpc.StatusCode.ABORTED,
    },
}


def _leaves(root: type[errors.OptserveError]) -> Iterator[type[errors.OptserveError]]:
    if not root.__subclasses__():
        yield root
    for child in root.__subclasses__():
        yield from _leaves(child)


LEAVES = list(_leaves(errors.OptserveError))


def test_the_table_is_total_over_the_leaves_of_the_tree() -> None:
    assert set(status.STATUS) == set(LEAVES)


def test_every_reason_is_used_once_and_internal_is_for_everything_else() -> None:
    used = [reason for _, reason in status.STATUS.values()]
    assert len(set(used)) == len(used)
    assert set(Reason.values()) - set(used) == {
        Reason.REASON_UNSPECIFIED,  # Another server's.
        Reason.REASON_INTERNAL,  # What is no OptserveError; see status.end_internal.
    }


@pytest.mark.parametrize("leaf", LEAVES, ids=[leaf.__name__ for leaf in LEAVES])
def test_the_code_says_whose_mistake_it_is(leaf: type[errors.OptserveError]) -> None:
    code, _ = status.STATUS[leaf]
    (allowed,) = [codes for owner, codes in CODES.items() if owner in leaf.__mro__]
    assert code in allowed


@pytest.mark.parametrize("leaf", LEAVES, ids=[leaf.__name__ for leaf in LEAVES])
def test_a_refusal_on_a_stream_carries_the_same_facts(leaf: type[errors.OptserveError]) -> None:
    error = leaf("what", field="where", expected=1, actual=2, retry_after_s=0.25)
    refusal = status.refusal(error)
    code, reason = status.STATUS[leaf]
    assert (refusal.code, refusal.reason) == (code.value[0], reason)
    assert (refusal.message, refusal.field) == ("what", "where")
    assert (refusal.expected, refusal.actual) == ("1", "2")
    assert refusal.retry_after.ToMilliseconds() == 250
    assert not status.refusal(leaf("what")).HasField("retry_after")
