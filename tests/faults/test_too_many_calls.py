"""Calls beyond those that may go on, or that may begin in a second, are refused with when to come.

Nobody who was let in is harmed by it.
"""

from __future__ import annotations

import time

import grpc
import torch
from drivers import take
from event_loop import TIMEOUT_S
from faults.ground import Ground, ground
from messages import messages_of
from refusals import RefusedError, refused, translated
from scenarios.models import create, gradients, model, spec

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_pb2 import SGD
from optserve_server.core.limits import Limits

RATE = 40


def _waiting_step(where: Ground, session_id: str) -> grpc.Future[pb.StepResponse]:
    """Begin a call that goes on until the other worker comes."""
    request = pb.StepRequest(session_id=session_id, step=1, gradients=messages_of(gradients(1)))
    return where.driver.stub.Step.future(request, timeout=TIMEOUT_S)


def _until_full(where: Ground) -> RefusedError:
    """Call until it is refused."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            where.driver.get(where.session_id)
        except RefusedError as error:
            return error
    raise AssertionError("nothing was refused")


def _is_refused(where: Ground) -> bool:
    try:
        where.driver.get(where.session_id)
    except RefusedError:
        return True
    return False


def test_a_call_beyond_calls_max_is_refused_and_those_that_go_on_are_not_harmed() -> None:
    with ground(Limits(calls_max=2)) as where:
        session_id = create(where.driver, spec(SGD(lr=1), workers=3))
        with where.driver.worker(session_id, 2) as third:  # A stream is no such call.
            waiting = [_waiting_step(where, session_id)]
            second = pb.StepRequest(
                session_id=session_id, worker=1, step=1, gradients=messages_of(gradients(2))
            )
            waiting.append(where.driver.stub.Step.future(second, timeout=TIMEOUT_S))
            time.sleep(0.5)  # Until the server has both.
            error = _until_full(where)
            assert (error.reason, error.code) == ("TOO_MANY", grpc.StatusCode.RESOURCE_EXHAUSTED)
            assert error.retry_after_s is not None
            assert error.expected == "at most 2 calls"
            take(third, 1, gradients(3))
            mean = (gradients(1)["b"] + gradients(2)["b"] + gradients(3)["b"]) / 3
            for call in waiting:
                with translated():
                    assert call.result().result.step == 1
        values = where.driver.download(session_id)
        assert torch.equal(values["b"], model()["b"] - mean)


def test_a_call_that_is_broken_off_makes_room() -> None:
    with ground(Limits(calls_max=1)) as where:
        session_id = create(where.driver, spec(SGD(lr=1), workers=2))
        waiting = _waiting_step(where, session_id)
        time.sleep(0.5)  # Until the server has it.
        assert _until_full(where).reason == "TOO_MANY"
        waiting.cancel()
        deadline = time.monotonic() + TIMEOUT_S
        while _is_refused(where):
            assert time.monotonic() < deadline


def test_calls_that_come_too_fast_are_refused_with_when_to_come() -> None:
    with ground(Limits(request_rate_max=RATE)) as where:
        error = _until_full(where)
        assert error.reason == "RATE_EXCEEDED"
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.retry_after_s is not None
        assert 0 < error.retry_after_s <= 1 / RATE
        time.sleep(error.retry_after_s)
        where.driver.get(where.session_id)


def test_the_steps_of_a_stream_are_no_calls() -> None:
    with ground(Limits(request_rate_max=RATE)) as where:
        session_id = create(where.driver, spec(SGD(lr=1)))
        with where.driver.worker(session_id) as worker:
            _until_full(where)
            for step in range(1, 2 * RATE):
                take(worker, step, gradients(step))
            with refused("RATE_EXCEEDED"):  # As long as it takes to find the bucket empty.
                while True:
                    where.driver.get(session_id)
