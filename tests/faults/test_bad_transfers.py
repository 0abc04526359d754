"""Tensors that come wrongly: in uploads, in evaluations, in steps. Nothing of them stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import grpc
import pytest
import torch
from event_loop import TIMEOUT_S
from faults.ground import CLASSES, STEPS, Ground, Mistakes
from messages import bytes_of, header_of, message_of
from refusals import RefusedError, translated
from scenarios.models import model

from optserve.limits import CHUNK_BYTES_MAX
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.tensor_pb2 import DataType, Tensor, TensorChunk, TensorChunks, TensorHeader

W, B = header_of("w", model()["w"]), header_of("b", model()["b"])
W_BYTES, B_BYTES = bytes_of(model()["w"]), bytes_of(model()["b"])
HUGE = TensorHeader(name="w", data_type=DataType.DATA_TYPE_FP32, shape=[2_500_000_000_000])


def _chunks(*chunks: tuple[int, int, bytes]) -> TensorChunks:
    return TensorChunks(
        chunks=[TensorChunk(tensor=tensor, offset=at, data=data) for tensor, at, data in chunks]
    )


FRAMING: dict[str, tuple[list[TensorChunks], str, str]] = {
    "tensor-not-announced": ([_chunks((2, 0, b"a"))], "CHUNK_OUT_OF_ORDER", "[2]"),
    "tensor-absurd": ([_chunks((2**32 - 1, 0, b"a"))], "CHUNK_OUT_OF_ORDER", f"[{2**32 - 1}]"),
    "gap": ([_chunks((0, 4, W_BYTES[4:]))], "CHUNK_OUT_OF_ORDER", "[0]"),
    "overlap": (
        [_chunks((0, 0, W_BYTES[:8]), (0, 4, W_BYTES[4:]))],
        "CHUNK_OUT_OF_ORDER",
        "[0]",
    ),
    "chunk-twice": (
        [_chunks((1, 0, B_BYTES)), _chunks((1, 0, B_BYTES))],
        "CHUNK_OUT_OF_ORDER",
        "[1]",
    ),
    "offset-absurd": ([_chunks((0, 2**64 - 1, b"abcd"))], "CHUNK_OUT_OF_ORDER", "[0]"),
    "chunk-empty": ([_chunks((0, 0, b""))], "CHUNK_OUT_OF_ORDER", "[0]"),
    "message-empty": ([TensorChunks()], "CHUNK_OUT_OF_ORDER", "chunks"),
    "bytes-too-many": ([_chunks((0, 0, W_BYTES + b"a"))], "BYTE_COUNT_MISMATCH", "[0]"),
    "bytes-too-few": (
        [_chunks((0, 0, W_BYTES), (1, 0, B_BYTES[:-1]))],
        "BYTE_COUNT_MISMATCH",
        "[1]",
    ),
    "bytes-missing": ([_chunks((1, 0, B_BYTES))], "BYTE_COUNT_MISMATCH", "[0]"),
}

HEADERS: dict[str, tuple[list[TensorHeader], str, str]] = {
    "name-unknown": ([W, header_of("v", model()["b"])], "UNKNOWN_NAME", "[1].name"),
    "name-empty": ([header_of("", model()["w"])], "INVALID_NAME", "[0].name"),
    "name-overlong": ([header_of("x" * 3_000_000, model()["w"])], "LIMIT_EXCEEDED", "[0].name"),
    "name-twice": ([B, W, B], "INVALID_NAME", "[2].name"),
    "type-unset": ([TensorHeader(name="w", shape=[3, 5])], "INVALID_FIELD", "[0].data_type"),
    "type-of-another": (
        [header_of("w", model()["w"].half())],
        "DATA_TYPE_MISMATCH",
        "[0].data_type",
    ),
    "shape-transposed": ([header_of("w", torch.ones(5, 3))], "SHAPE_MISMATCH", "[0].shape"),
    "shape-flat": ([header_of("w", torch.ones(15))], "SHAPE_MISMATCH", "[0].shape"),
    "shape-negative": (
        [TensorHeader(name="w", data_type=W.data_type, shape=[-3, -5])],
        "INVALID_FIELD",
        "[0].shape",
    ),
    "shape-of-ten-terabytes": ([HUGE], "SHAPE_MISMATCH", "[0].shape"),
    "headers-too-many": ([W] * 10_001, "LIMIT_EXCEEDED", ""),
}


def _upload(ground: Ground, *requests: pb.UploadParametersRequest) -> None:
    with translated():
        ground.driver.stub.UploadParameters(iter(requests), timeout=TIMEOUT_S)


def _upload_begin(ground: Ground, headers: Sequence[TensorHeader]) -> pb.UploadParametersRequest:
    begin = pb.UploadBegin(session_id=ground.session_id, parameters=headers)
    return pb.UploadParametersRequest(begin=begin)


@pytest.mark.parametrize(("messages", "reason", "place"), FRAMING.values(), ids=FRAMING)
def test_an_upload_in_wrong_chunks_is_refused(
    mistakes: Mistakes, messages: list[TensorChunks], reason: str, place: str
) -> None:
    begin = _upload_begin(mistakes.ground, [W, B])
    chunks = [pb.UploadParametersRequest(chunks=message) for message in messages]
    field = place if place == "chunks" else f"begin.parameters{place}"
    with mistakes.refused(reason, field):
        _upload(mistakes.ground, begin, *chunks)


@pytest.mark.parametrize(("headers", "reason", "place"), HEADERS.values(), ids=HEADERS)
def test_an_upload_of_what_is_no_parameter_is_refused(
    mistakes: Mistakes, headers: list[TensorHeader], reason: str, place: str
) -> None:
    begin = _upload_begin(mistakes.ground, headers)
    with mistakes.refused(reason, f"begin.parameters{place}"):
        _upload(mistakes.ground, begin)


def test_an_upload_in_the_wrong_order_is_refused(mistakes: Mistakes) -> None:
    begin = _upload_begin(mistakes.ground, [W])
    chunks = pb.UploadParametersRequest(chunks=_chunks((0, 0, W_BYTES)))
    nothing = pb.UploadParametersRequest()
    for requests in ([], [chunks], [nothing], [begin, begin], [begin, chunks, nothing]):
        with mistakes.refused("EVENT_OUT_OF_ORDER", "event"):
            _upload(mistakes.ground, *requests)
    with mistakes.refused("MISSING_FIELD", "begin.parameters"):
        _upload(mistakes.ground, _upload_begin(mistakes.ground, []))


def test_an_upload_that_is_broken_off_changes_nothing(mistakes: Mistakes) -> None:
    ground = mistakes.ground
    before = ground.look()

    def requests() -> Iterator[pb.UploadParametersRequest]:
        yield _upload_begin(ground, [W, B])
        yield pb.UploadParametersRequest(chunks=_chunks((0, 0, bytes(len(W_BYTES)))))
        call.cancel()

    call = ground.driver.stub.UploadParameters.future(requests(), timeout=TIMEOUT_S)
    with pytest.raises(grpc.FutureCancelledError):
        call.result()
    assert ground.look_until(before) == before


@pytest.mark.parametrize("name", ["v", "", "w\x00"])
def test_a_download_of_what_is_no_parameter_is_refused(mistakes: Mistakes, name: str) -> None:
    with mistakes.refused("UNKNOWN_NAME", "names[1]"):
        mistakes.ground.driver.download(mistakes.ground.session_id, ["w", name])


LOGITS, LABELS = torch.eye(CLASSES), torch.arange(CLASSES)


def _evaluate(ground: Ground, begin: pb.LossBegin | None, *messages: TensorChunks) -> None:
    requests = [pb.EvaluateLossStreamRequest(chunks=message) for message in messages]
    if begin is not None:
        begin.session_id = ground.session_id
        requests.insert(0, pb.EvaluateLossStreamRequest(begin=begin))
    with translated():
        list(ground.driver.stub.EvaluateLossStream(iter(requests), timeout=TIMEOUT_S))


EVALUATIONS: dict[str, tuple[list[TensorChunks], str, str]] = {
    "tensor-not-announced": ([_chunks((2, 0, b"a"))], "CHUNK_OUT_OF_ORDER", "chunks"),
    "gap": ([_chunks((1, 8, b"a"))], "CHUNK_OUT_OF_ORDER", "begin.targets"),
    "bytes-too-many": ([_chunks((0, 0, bytes(65)))], "BYTE_COUNT_MISMATCH", "begin.predictions"),
    "bytes-missing": ([_chunks((0, 0, bytes(64)))], "BYTE_COUNT_MISMATCH", "begin.targets"),
    "message-empty": ([TensorChunks()], "CHUNK_OUT_OF_ORDER", "chunks"),
}


@pytest.mark.parametrize(("messages", "reason", "field"), EVALUATIONS.values(), ids=EVALUATIONS)
def test_an_evaluation_in_wrong_chunks_is_refused(
    mistakes: Mistakes, messages: list[TensorChunks], reason: str, field: str
) -> None:
    begin = pb.LossBegin(predictions=header_of("", LOGITS), targets=header_of("", LABELS))
    with mistakes.refused(reason, field):
        _evaluate(mistakes.ground, begin, *messages)


def test_an_evaluation_in_the_wrong_order_is_refused(mistakes: Mistakes) -> None:
    with mistakes.refused("EVENT_OUT_OF_ORDER", "event"):
        _evaluate(mistakes.ground, None)
    with mistakes.refused("EVENT_OUT_OF_ORDER", "event"):
        _evaluate(mistakes.ground, None, _chunks((0, 0, b"a")))
    for begin, missing in (
        (pb.LossBegin(targets=header_of("", LABELS)), "predictions"),
        (pb.LossBegin(predictions=header_of("", LOGITS)), "targets"),
    ):
        with mistakes.refused("MISSING_FIELD", f"begin.{missing}"):
            _evaluate(mistakes.ground, begin)


def _train(ground: Ground, *events: pb.TrainRequest) -> list[str]:
    """Send events on a stream of their own; return what came, or raise the first refusal."""
    opening = pb.TrainOpen(session_id=ground.session_id)
    requests = [pb.TrainRequest(open=opening), *events]
    came = []
    with translated():
        for response in ground.driver.stub.Train(iter(requests), timeout=TIMEOUT_S):
            if response.HasField("refused"):
                assert response.refused.step == STEPS + 1
                raise RefusedError.from_message(response.refused.refusal)
            came.append(str(response.WhichOneof("event")))
    return came


def _begin(*headers: TensorHeader, step: int = STEPS + 1) -> pb.TrainRequest:
    return pb.TrainRequest(begin=pb.StepBegin(step=step, gradients=headers))


END = pb.TrainRequest(end=pb.StepEnd())


@pytest.mark.parametrize(("messages", "reason", "place"), FRAMING.values(), ids=FRAMING)
def test_a_step_in_wrong_chunks_is_refused(
    mistakes: Mistakes, messages: list[TensorChunks], reason: str, place: str
) -> None:
    chunks = [pb.TrainRequest(chunks=message) for message in messages]
    field = place if place == "chunks" else f"gradients{place}"
    with mistakes.refused(reason, field):
        _train(mistakes.ground, _begin(W, B), *chunks, END)


@pytest.mark.parametrize(("headers", "reason", "place"), HEADERS.values(), ids=HEADERS)
def test_a_step_with_gradients_of_nothing_is_refused(
    mistakes: Mistakes, headers: list[TensorHeader], reason: str, place: str
) -> None:
    with mistakes.refused(reason, f"gradients{place}"):
        _train(mistakes.ground, _begin(*headers), END)


def test_more_bytes_in_a_message_than_allowed_are_refused(mistakes: Mistakes) -> None:
    driver = mistakes.ground.driver
    size = CHUNK_BYTES_MAX // 4 + 1
    spec = mistakes.ground.look().session.spec
    del spec.parameters[:], spec.groups[:]
    spec.parameters.append(header_of("large", torch.zeros(size)))
    session_id = driver.create(spec).status.session_id
    begin = pb.UploadBegin(session_id=session_id, parameters=spec.parameters)
    chunks = _chunks((0, 0, bytes(4 * size)))
    with mistakes.refused("LIMIT_EXCEEDED", "chunks"):
        _upload(
            mistakes.ground,
            pb.UploadParametersRequest(begin=begin),
            pb.UploadParametersRequest(chunks=chunks),
        )
    driver.delete(session_id)


ORDERS: dict[str, list[pb.TrainRequest]] = {
    "chunks-before-begin": [pb.TrainRequest(chunks=_chunks((0, 0, W_BYTES)))],
    "end-before-begin": [END],
    "opened-twice": [pb.TrainRequest(open=pb.TrainOpen())],
    "opened-in-a-step": [_begin(W), pb.TrainRequest(open=pb.TrainOpen())],
    "nothing": [pb.TrainRequest()],
    "nothing-in-a-step": [_begin(W), pb.TrainRequest()],
    "end-twice": [_begin(step=STEPS), END, END],
}


@pytest.mark.parametrize("events", ORDERS.values(), ids=ORDERS)
def test_events_in_the_wrong_order_end_the_stream(
    mistakes: Mistakes, events: list[pb.TrainRequest]
) -> None:
    with mistakes.refused("EVENT_OUT_OF_ORDER", "event"):
        _train(mistakes.ground, *events)


def test_a_stream_begins_with_an_opening(mistakes: Mistakes) -> None:
    stub = mistakes.ground.driver.stub
    for requests in ([], [_begin(W)], [END], [pb.TrainRequest()]):
        with mistakes.refused("EVENT_OUT_OF_ORDER", "event"), translated():
            list(stub.Train(iter(requests), timeout=TIMEOUT_S))


def test_a_step_that_was_begun_and_not_ended_is_given_up_by_the_next_begin(
    mistakes: Mistakes,
) -> None:
    again = [
        _begin(W, B),
        pb.TrainRequest(chunks=_chunks((0, 0, bytes(8)))),
        _begin(step=STEPS),
        END,
    ]
    before = mistakes.ground.look()
    assert _train(mistakes.ground, *again)[0] == "opened"
    assert _train(mistakes.ground, *again)[-1] == "result"
    assert mistakes.ground.look() == before


def test_a_stream_that_ends_in_the_middle_of_a_step_changes_nothing(mistakes: Mistakes) -> None:
    before = mistakes.ground.look()
    _train(mistakes.ground, _begin(W, B), pb.TrainRequest(chunks=_chunks((0, 0, W_BYTES))))
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
