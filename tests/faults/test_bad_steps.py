"""Steps that come wrongly, in every form that a step has. Nothing of them stays."""

from __future__ import annotations

import pytest
import torch
from event_loop import TIMEOUT_S
from faults.framing import B_BYTES, FRAMING, HEADERS, HUGE, W_BYTES, B, W, chunks_at, large_session
from faults.ground import STEPS, Ground, Mistakes
from messages import bytes_of, message_of
from refusals import RefusedError, translated
from scenarios.models import model

from optserve.limits import CHUNK_BYTES_MAX
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.tensor_pb2 import Tensor, TensorChunks, TensorHeader


def _train(ground: Ground, *events: pb.TrainRequest, session_id: str = "") -> list[str]:
    """Send events on a stream of their own; return what came, or raise the first refusal."""
    opening = pb.TrainOpen(session_id=session_id or ground.session_id)
    requests = [pb.TrainRequest(open=opening), *events]
    came, refusal = [], None
    with translated():
        for response in ground.driver.stub.Train(iter(requests), timeout=TIMEOUT_S):
            if refusal is None and response.HasField("refused"):
                assert response.refused.step == STEPS + 1
                refusal = RefusedError.from_message(response.refused.refusal)
            came.append(str(response.WhichOneof("event")))
    if refusal is not None:
        raise refusal
    return came


def _begin(*headers: TensorHeader, step: int = STEPS + 1) -> pb.TrainRequest:
    return pb.TrainRequest(begin=pb.StepBegin(step=step, gradients=headers))


def _begin_every(*headers: TensorHeader, step: int = STEPS + 1) -> pb.TrainRequest:
    begin = pb.StepBegin(step=step, every_parameter=True, gradients=headers)
    return pb.TrainRequest(begin=begin)


def _packed(*gradients: bytes, step: int = STEPS + 1) -> pb.TrainRequest:
    return pb.TrainRequest(packed=pb.PackedStep(step=step, gradients=gradients))


END = pb.TrainRequest(end=pb.StepEnd())


@pytest.mark.parametrize("begin", [_begin(W, B), _begin_every()], ids=["announced", "every"])
@pytest.mark.parametrize(("messages", "reason", "place"), FRAMING.values(), ids=FRAMING)
def test_a_step_in_wrong_chunks_is_refused(
    mistakes: Mistakes,
    begin: pb.TrainRequest,
    messages: list[TensorChunks],
    reason: str,
    place: str,
) -> None:
    chunks = [pb.TrainRequest(chunks=message) for message in messages]
    field = place if place == "chunks" else f"gradients{place}"
    with mistakes.refused(reason, field):
        _train(mistakes.ground, begin, *chunks, END)


@pytest.mark.parametrize(("headers", "reason", "place"), HEADERS.values(), ids=HEADERS)
def test_a_step_with_gradients_of_nothing_is_refused(
    mistakes: Mistakes, headers: list[TensorHeader], reason: str, place: str
) -> None:
    with mistakes.refused(reason, f"gradients{place}"):
        _train(mistakes.ground, _begin(*headers), END)


@pytest.mark.parametrize("headers", [[W], [W, B], [HUGE]], ids=["some", "all", "huge"])
def test_a_step_of_every_parameter_announces_no_gradients(
    mistakes: Mistakes, headers: list[TensorHeader]
) -> None:
    with mistakes.refused("INVALID_FIELD", "gradients"):
        _train(mistakes.ground, _begin_every(*headers), END)


PACKED: dict[str, tuple[list[bytes], str, str]] = {
    "none": ([], "INVALID_FIELD", "gradients"),
    "too-few": ([W_BYTES], "INVALID_FIELD", "gradients"),
    "too-many": ([W_BYTES, B_BYTES, b""], "INVALID_FIELD", "gradients"),
    "far-too-many": ([b""] * 100_000, "INVALID_FIELD", "gradients"),
    "in-another-order": ([B_BYTES, W_BYTES], "BYTE_COUNT_MISMATCH", "gradients[0]"),
    "bytes-too-few": ([W_BYTES, B_BYTES[:-1]], "BYTE_COUNT_MISMATCH", "gradients[1]"),
    "bytes-too-many": ([W_BYTES + b"a", B_BYTES], "BYTE_COUNT_MISMATCH", "gradients[0]"),
    "bytes-missing": ([W_BYTES, b""], "BYTE_COUNT_MISMATCH", "gradients[1]"),
    "not-a-number": (
        [W_BYTES, bytes_of(torch.full((5,), torch.nan))],
        "NON_FINITE_GRADIENT",
        "gradients['b']",
    ),
}


@pytest.mark.parametrize(("gradients", "reason", "field"), PACKED.values(), ids=PACKED)
def test_a_packed_step_that_does_not_hold_what_it_must_is_refused(
    mistakes: Mistakes, gradients: list[bytes], reason: str, field: str
) -> None:
    with mistakes.refused(reason, field):
        _train(mistakes.ground, _packed(*gradients))


@pytest.mark.parametrize("step", [0, STEPS - 1, STEPS + 2, 2**64 - 1])
def test_a_step_out_of_turn_is_refused_in_every_form(mistakes: Mistakes, step: int) -> None:
    stub = mistakes.ground.driver.stub
    opening = pb.TrainRequest(open=pb.TrainOpen(session_id=mistakes.ground.session_id))
    for event in (
        _begin(W, B, step=step),
        _begin_every(step=step),
        _packed(W_BYTES, B_BYTES, step=step),
    ):
        with mistakes.refused("STEP_OUT_OF_ORDER", "step"):
            _, answer = stub.Train(iter([opening, event]), timeout=TIMEOUT_S)
            assert answer.refused.step == step
            raise RefusedError.from_message(answer.refused.refusal)


def test_a_packed_step_of_a_large_model_is_refused(mistakes: Mistakes) -> None:
    """Whatever it holds: it is the answer that would be too large."""
    with large_session(mistakes.ground) as session_id:
        for gradients in ([], [b"abcd"], [bytes(CHUNK_BYTES_MAX + 4)]):
            with mistakes.refused("LIMIT_EXCEEDED", "packed"):
                _train(mistakes.ground, _packed(*gradients), session_id=session_id)


ORDERS: dict[str, list[pb.TrainRequest]] = {
    "chunks-before-begin": [pb.TrainRequest(chunks=chunks_at((0, 0, W_BYTES)))],
    "end-before-begin": [END],
    "opened-twice": [pb.TrainRequest(open=pb.TrainOpen())],
    "opened-in-a-step": [_begin(W), pb.TrainRequest(open=pb.TrainOpen())],
    "nothing": [pb.TrainRequest()],
    "nothing-in-a-step": [_begin(W), pb.TrainRequest()],
    "end-twice": [_begin(step=STEPS), END, END],
    "end-of-a-packed-step": [_packed(W_BYTES, B_BYTES, step=STEPS), END],
    "chunks-of-a-packed-step": [
        _packed(W_BYTES, B_BYTES, step=STEPS),
        pb.TrainRequest(chunks=chunks_at((0, 0, W_BYTES))),
    ],
    "end-of-a-step-that-a-packed-one-has-given-up": [
        _begin(W, B),
        _packed(W_BYTES, B_BYTES, step=STEPS),
        END,
    ],
}


@pytest.mark.parametrize("events", ORDERS.values(), ids=ORDERS)
def test_events_in_the_wrong_order_end_the_stream(
    mistakes: Mistakes, events: list[pb.TrainRequest]
) -> None:
    with mistakes.refused("EVENT_OUT_OF_ORDER", "event"):
        _train(mistakes.ground, *events)


def test_a_stream_begins_with_an_opening(mistakes: Mistakes) -> None:
    stub = mistakes.ground.driver.stub
    chunks = pb.TrainRequest(chunks=chunks_at((0, 0, W_BYTES)))
    for requests in ([], [_begin(W)], [chunks], [END], [_packed()], [pb.TrainRequest()]):
        with mistakes.refused("EVENT_OUT_OF_ORDER", "event"), translated():
            list(stub.Train(iter(requests), timeout=TIMEOUT_S))


def test_a_step_that_was_begun_and_not_ended_is_given_up_by_the_next_begin(
    mistakes: Mistakes,
) -> None:
    again = [
        _begin(W, B),
        pb.TrainRequest(chunks=chunks_at((0, 0, bytes(8)))),
        _begin(step=STEPS),
        END,
    ]
    before = mistakes.ground.look()
    assert _train(mistakes.ground, *again)[0] == "opened"
    assert _train(mistakes.ground, *again)[-1] == "result"
    assert mistakes.ground.look() == before


@pytest.mark.parametrize("begin", [_begin(W, B), _begin_every()], ids=["announced", "every"])
def test_a_step_that_was_begun_and_not_ended_is_given_up_by_a_packed_one(
    mistakes: Mistakes, begin: pb.TrainRequest
) -> None:
    before = mistakes.ground.look()
    events = [
        begin,
        pb.TrainRequest(chunks=chunks_at((0, 0, bytes(8)))),
        _packed(W_BYTES, B_BYTES, step=STEPS),
    ]
    assert _train(mistakes.ground, *events) == ["opened", "packed"]
    assert mistakes.ground.look() == before


def test_after_a_refused_packed_step_all_is_ignored_until_the_next_one(
    mistakes: Mistakes,
) -> None:
    before, stub = mistakes.ground.look(), mistakes.ground.driver.stub
    ignored = [pb.TrainRequest(chunks=chunks_at((7, 7, b"whatever"))), END, END]
    replays = [_packed(W_BYTES, B_BYTES, step=STEPS), _begin_every(step=STEPS)]
    opening = pb.TrainRequest(open=pb.TrainOpen(session_id=mistakes.ground.session_id))
    requests = [opening, _packed(), *ignored, replays[0], _packed(), *ignored, replays[1], END]
    came = [each.WhichOneof("event") for each in stub.Train(iter(requests), timeout=TIMEOUT_S)]
    assert came == ["opened", "refused", "packed", "refused", "begin", "chunks", "result"]
    assert mistakes.ground.look() == before


def test_a_stream_that_ends_in_the_middle_of_a_step_changes_nothing(mistakes: Mistakes) -> None:
    before = mistakes.ground.look()
    _train(mistakes.ground, _begin(W, B), pb.TrainRequest(chunks=chunks_at((0, 0, W_BYTES))))
    assert mistakes.ground.look() == before


STEPS_IN_A_MESSAGE: dict[str, tuple[list[Tensor], str, str]] = {
    "name-unknown": ([message_of(model()["w"], "v")], "UNKNOWN_NAME", "gradients[0].name"),
    "shape": ([message_of(torch.ones(5, 3), "w")], "SHAPE_MISMATCH", "gradients[0].shape"),
    "type": (
        [message_of(model()["w"].double(), "w")],
        "DATA_TYPE_MISMATCH",
        "gradients[0].data_type",
    ),
    "bytes-too-few": (
        [message_of(model()["b"], "b"), Tensor(header=W, data=W_BYTES[1:])],
        "BYTE_COUNT_MISMATCH",
        "gradients[1].data",
    ),
    "twice": ([message_of(model()["b"], "b")] * 2, "INVALID_NAME", "gradients[1].name"),
    "header-missing": ([Tensor(data=B_BYTES)], "INVALID_FIELD", "gradients[0].data_type"),
    "not-a-number": (
        [message_of(torch.full((5,), torch.nan), "b")],
        "NON_FINITE_GRADIENT",
        "gradients['b']",
    ),
    "none": ([], "NO_GRADIENT", "gradients"),
}


@pytest.mark.parametrize(
    ("gradients", "reason", "field"), STEPS_IN_A_MESSAGE.values(), ids=STEPS_IN_A_MESSAGE
)
def test_a_step_in_one_message_is_held_to_the_same(
    mistakes: Mistakes, gradients: list[Tensor], reason: str, field: str
) -> None:
    request = pb.StepRequest(
        session_id=mistakes.ground.session_id, step=STEPS + 1, gradients=gradients
    )
    with mistakes.refused(reason, field), translated():
        mistakes.ground.driver.stub.Step(request, timeout=TIMEOUT_S)
