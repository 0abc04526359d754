"""Calls whose client goes away, and answers that would not fit: nothing is lost, or left behind."""

from __future__ import annotations

import time

import grpc
import pytest
import torch
from drivers import take
from event_loop import TIMEOUT_S
from faults.ground import Mistakes, ground
from messages import header_of, message_of, messages_of
from refusals import refused, translated
from scenarios.models import create, gradients, model, spec

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.loss_pb2 import CrossEntropyLoss, MSELoss, Reduction
from optserve.v1.optimizer_pb2 import SGD
from optserve_server.core.limits import Limits

LARGE = {"large": torch.zeros(16_000_000)}  # 64 MB: more than any buffer on the way holds.


def test_a_session_whose_creator_has_gone_is_not_left_behind(mistakes: Mistakes) -> None:
    where = mistakes.ground
    before = where.look()
    request = pb.CreateSessionRequest(spec=spec(SGD(), parameters=LARGE))
    for delay_s in (0, 0.001, 0.002, 0.005, 0.01):
        call = where.driver.stub.CreateSession.future(request, timeout=TIMEOUT_S)
        time.sleep(delay_s)
        if not call.cancel():
            where.driver.delete(call.result().session.status.session_id)
    assert where.look_until(before) == before


def test_a_request_whose_first_call_has_gone_makes_one_session(mistakes: Mistakes) -> None:
    """Whether the session is being made, is being undone, or is there."""
    where = mistakes.ground
    before = where.look()
    for number, delay_s in enumerate((0, 0.001, 0.002, 0.005, 0.01, 0.05)):
        request = pb.CreateSessionRequest(
            spec=spec(SGD(), parameters=LARGE), request_id=f"gone-{number}"
        )
        call = where.driver.stub.CreateSession.future(request, timeout=TIMEOUT_S)
        time.sleep(delay_s)
        call.cancel()
        came = where.driver.stub.CreateSession(request, timeout=TIMEOUT_S).session
        again = where.driver.stub.CreateSession(request, timeout=TIMEOUT_S).session
        assert came == again
        assert len(where.driver.sessions().sessions) == len(before.sessions) + 1
        where.driver.delete(came.status.session_id)
    assert where.look_until(before) == before


def test_a_request_that_nobody_waits_for_any_more_is_undone(mistakes: Mistakes) -> None:
    where = mistakes.ground
    before = where.look()
    request = pb.CreateSessionRequest(spec=spec(SGD(), parameters=LARGE), request_id="nobody-waits")
    calls = [where.driver.stub.CreateSession.future(request, timeout=TIMEOUT_S) for _ in range(3)]
    time.sleep(0.002)
    for call in calls:
        call.cancel()
    seen = where.look_until(before)
    if seen != before:  # It was there before anybody had gone.
        where.driver.delete(where.driver.stub.CreateSession(request).session.status.session_id)
    assert where.look_until(before) == before


def test_a_deletion_whose_client_has_gone_is_finished() -> None:
    with ground(Limits(stall_timeout_s=1)) as where:
        before = where.look()
        session_id = where.driver.create(spec(SGD(), parameters=LARGE)).status.session_id
        where.driver.upload(session_id, LARGE)
        request = pb.DownloadParametersRequest(session_id=session_id)
        unread = where.driver.stub.DownloadParameters(request, timeout=TIMEOUT_S)
        next(unread)  # Holds the session, and does not read on.
        call = where.driver.stub.DeleteSession.future(
            pb.DeleteSessionRequest(session_id=session_id), timeout=TIMEOUT_S
        )
        time.sleep(0.1)
        call.cancel()
        unread.cancel()
        assert where.look_until(before) == before


def test_a_step_in_one_message_that_timed_out_is_applied_once() -> None:
    with ground() as where:
        session_id = create(where.driver, spec(SGD(lr=1), workers=2))
        request = pb.StepRequest(session_id=session_id, step=1, gradients=messages_of(gradients(1)))
        for _ in range(3):  # The other worker does not come: the contribution waits.
            with pytest.raises(grpc.RpcError) as caught:
                where.driver.stub.Step(request, timeout=0.1)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        with where.driver.worker(session_id, 1) as other:
            came = take(other, 1, gradients(2)).parameters
        mean = (gradients(1)["b"] + gradients(2)["b"]) / 2
        assert torch.equal(came["b"], model()["b"] - mean)

        with where.driver.worker(session_id, 0) as late:
            assert take(late, 1, {}).result.replayed
        assert where.driver.get(session_id).status.steps == 1


def test_a_step_whose_answer_would_not_fit_is_refused_before_it_is_made(
    mistakes: Mistakes,
) -> None:
    where = mistakes.ground
    names = [f"parameter-number-{i:05}-with-a-long-name" for i in range(9_000)]
    values = {name: torch.zeros(110) for name in names}  # 4 MB, and half a MB of headers.
    session_id = where.driver.create(spec(SGD(), parameters=values)).status.session_id
    where.driver.upload(session_id, values)
    gradient = [message_of(torch.ones(110), names[0])]
    request = pb.StepRequest(session_id=session_id, step=1, gradients=gradient)
    with refused("LIMIT_EXCEEDED"), translated():
        where.driver.stub.Step(request, timeout=TIMEOUT_S)
    assert where.driver.get(session_id).status.steps == 0
    with where.driver.worker(session_id) as worker:
        answer = take(worker, 1, {names[0]: torch.ones(110)})
    assert len(answer.parameters) == len(names)
    where.driver.delete(session_id)


def test_a_loss_whose_session_could_not_be_answered_with_any_more_is_refused(
    mistakes: Mistakes,
) -> None:
    where = mistakes.ground
    values = {f"{i}".rjust(200, "x"): torch.zeros(1) for i in range(2_000)}
    session_id = where.driver.create(spec(SGD(), parameters=values)).status.session_id
    weight = message_of(torch.ones(900_000))
    request = pb.UpdateSessionRequest(session_id=session_id)
    request.loss.cross_entropy_loss.CopyFrom(CrossEntropyLoss(weight=weight))
    with refused("LIMIT_EXCEEDED"):
        where.driver.update(request)
    assert not where.driver.get(session_id).spec.HasField("loss")
    where.driver.delete(session_id)


def test_an_evaluation_whose_answer_would_not_fit_is_refused(mistakes: Mistakes) -> None:
    where = mistakes.ground
    wanted = spec(SGD(), loss=MSELoss(reduction=Reduction.REDUCTION_NONE))
    session_id = where.driver.create(wanted).status.session_id
    half = torch.zeros(520_000)  # 2 MB, and as much of targets, of elements, of the gradient.
    with mistakes.refused("LIMIT_EXCEEDED", "predictions"):
        where.driver.evaluate(session_id, half, half, gradient=True)
    assert where.driver.evaluate(session_id, half, half).elements is not None
    begin = pb.LossBegin(
        session_id=session_id,
        gradient=True,
        predictions=header_of("", half),
        targets=header_of("", half),
    )
    assert where.driver.evaluate_stream(begin, [half, half]).result.loss == 0
    where.driver.delete(session_id)
