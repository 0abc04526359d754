from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from google.protobuf.message import Message

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.error_pb2 import Reason, Refusal
from optserve.v1.session_pb2 import SessionStatus
from optserve.v1.tensor_pb2 import DataType, TensorHeader
from optserve.wire import Buffer, Chunk, split
from optserve_client._digest import DigestedBuffer, StepDigest
from optserve_client._exchange import (
    Download,
    LossEvaluation,
    Opening,
    PackedStep,
    Step,
    TrainAnswer,
    upload_requests,
)
from optserve_client._incoming import Room
from optserve_client.errors import ProtocolError
from optserve_client.tensors import Array, bytes_of

W = TensorHeader(name="w", data_type=DataType.DATA_TYPE_FP32, shape=[4])
B = TensorHeader(name="b", data_type=DataType.DATA_TYPE_FP32, shape=[])
W_VALUES, B_VALUE = np.arange(4, dtype=np.float32), np.float32(7)


def chunks(*parts: tuple[int, int, bytes]) -> list[Chunk]:
    return [Chunk(tensor, offset, memoryview(data)) for tensor, offset, data in parts]


def both_parameters() -> list[Chunk]:
    return chunks((0, 0, W_VALUES.tobytes()), (1, 0, B_VALUE.tobytes()))


def source_of(array: Array) -> Buffer:
    return Buffer(bytes_of(array))


def events_of(requests: Iterable[Message | list[Chunk]]) -> list[str | None]:
    return ["chunks" if isinstance(r, list) else r.WhichOneof("event") for r in requests]


def data_of(requests: Iterable[Message | list[Chunk]]) -> bytes:
    return b"".join(bytes(c.data) for r in requests if isinstance(r, list) for c in r)


def step_of(gradient: Array = W_VALUES, room: Room | None = None) -> Step:
    """Return a step with a gradient for one of the two parameters, and so announced."""
    announced = pb.StepBegin(step=3, gradients=[W])
    into = room or Room([W, B])
    digest = StepDigest(["w", "b"])
    sources = [DigestedBuffer(bytes_of(gradient), digest.part("w"))]
    return Step(announced, split(sources, 8), [W, B], into, digest=digest)


def step_of_every_parameter() -> Step:
    begin = pb.StepBegin(step=3, every_parameter=True)
    gradients = [source_of(W_VALUES), source_of(np.asarray(B_VALUE))]
    return Step(begin, split(gradients, 8), [W, B], Room([W, B]))


def packed_step() -> PackedStep:
    digest = StepDigest(["w", "b"])
    gradients = [source_of(W_VALUES), source_of(np.asarray(B_VALUE))]
    return PackedStep(3, gradients, [W, B], digest)


def begin(step: int = 3, parameters: Sequence[TensorHeader] = (W, B)) -> pb.TrainResponse:
    return pb.TrainResponse(begin=pb.ParametersBegin(step=step, parameters=parameters))


def result(step: int = 3) -> pb.TrainResponse:
    return pb.TrainResponse(result=pb.StepResult(step=step))


def packed(*parameters: bytes, step: int = 3) -> pb.TrainResponse:
    answer = pb.PackedParameters(result=pb.StepResult(step=step), parameters=parameters)
    return pb.TrainResponse(packed=answer)


def refused(step: int = 3) -> pb.TrainResponse:
    refusal = Refusal(reason=Reason.REASON_NON_FINITE_GRADIENT, message="no")
    return pb.TrainResponse(refused=pb.StepRefused(step=step, refusal=refusal))


def test_a_stream_opens_with_the_session_and_the_worker() -> None:
    opening = Opening("id", 2)
    (request,) = opening.requests()
    assert request == pb.TrainRequest(open=pb.TrainOpen(session_id="id", worker=2))
    status = SessionStatus(session_id="id", steps=5)
    assert opening.receive(pb.TrainResponse(opened=pb.TrainOpened(status=status)))
    assert opening.opened == pb.TrainOpened(status=status)


def test_a_stream_that_opens_with_something_else_is_not_understood() -> None:
    with pytest.raises(ProtocolError, match="sent result where opened"):
        Opening("id", 0).receive(result())


def test_a_step_is_sent_as_begin_chunks_end() -> None:
    requests = list(step_of().requests())
    assert events_of(requests) == ["begin", "chunks", "chunks", "end"]
    assert requests[0] == pb.TrainRequest(begin=pb.StepBegin(step=3, gradients=[W]))
    assert data_of(requests) == W_VALUES.tobytes()


def test_a_step_of_every_parameter_announces_nothing_and_is_answered_so() -> None:
    step = step_of_every_parameter()
    requests = list(step.requests())
    assert events_of(requests) == ["begin", "chunks", "chunks", "chunks", "end"]
    assert requests[0] == pb.TrainRequest(begin=pb.StepBegin(step=3, every_parameter=True))
    assert data_of(requests) == W_VALUES.tobytes() + B_VALUE.tobytes()
    with pytest.raises(ProtocolError, match="other tensors"):
        step_of_every_parameter().receive(begin())
    assert not step.receive(begin(parameters=[]))
    assert not step.receive(both_parameters())
    assert step.receive(result())
    assert step.parameters is not None
    assert [values.tolist() for values in step.parameters] == [[0, 1, 2, 3], 7]


def test_a_packed_step_is_one_message_each_way() -> None:
    step = packed_step()
    (request,) = step.requests()
    assert isinstance(request, pb.TrainRequest)
    assert request.packed.step == 3
    assert list(request.packed.gradients) == [W_VALUES.tobytes(), B_VALUE.tobytes()]
    assert step.receive(packed(W_VALUES.tobytes(), B_VALUE.tobytes()))
    assert step.result == pb.StepResult(step=3)
    assert step.parameters is not None
    w, b = step.parameters
    assert np.array_equal(w, W_VALUES)
    assert b.shape == ()
    assert b == B_VALUE
    assert not w.flags.writeable
    assert not b.flags.writeable


def test_a_packed_step_is_over_with_a_refusal() -> None:
    step = packed_step()
    assert step.receive(refused())
    assert step.refusal == refused().refused.refusal
    assert step.parameters is None
    assert step.result is None


def test_a_step_is_over_with_its_result_and_its_parameters_are_read_only() -> None:
    step = step_of()
    assert not step.receive(begin())
    assert not step.receive(both_parameters())
    assert step.receive(result())
    assert step.parameters is not None
    w, b = step.parameters
    assert np.array_equal(w, W_VALUES)
    assert b.shape == ()
    assert b == B_VALUE
    assert not w.flags.writeable


def test_an_answer_may_begin_before_the_last_gradient_is_sent() -> None:
    step = step_of()
    requests = step.requests()
    next(requests)
    step.receive(begin())
    step.receive(chunks((1, 0, B_VALUE.tobytes())))
    assert events_of(requests) == ["chunks", "chunks", "end"]
    step.receive(chunks((0, 0, W_VALUES.tobytes())))
    assert step.receive(result())


def test_a_refusal_takes_back_the_parameters_that_had_come() -> None:
    step = step_of()
    step.receive(begin())
    step.receive(both_parameters())
    assert step.receive(refused())
    assert step.refusal == refused().refused.refusal
    assert step.parameters is None
    assert step.result is None


def test_an_answer_that_begins_twice_counts_from_its_second_beginning() -> None:
    step = step_of()
    step.receive(begin())
    step.receive(chunks((0, 0, b"of another ste"), (1, 0, b"p")))
    assert not step.receive(begin())
    assert not step.receive(chunks((1, 0, B_VALUE.tobytes())))
    assert not step.receive(chunks((0, 0, W_VALUES.tobytes())))
    assert step.receive(result())
    assert step.parameters is not None
    assert [values.tolist() for values in step.parameters] == [[0, 1, 2, 3], 7]


def test_what_came_before_a_second_beginning_is_not_made_up_for_by_it() -> None:
    step = step_of()
    step.receive(begin())
    step.receive(both_parameters())
    step.receive(begin())
    with pytest.raises(ProtocolError, match="incomplete"):
        step.receive(result())


def test_a_step_fills_the_memory_that_it_is_given() -> None:
    room = Room([W, B])
    step = step_of(room=room)
    step.receive(begin())
    step.receive(both_parameters())
    step.receive(result())
    assert step.parameters is room.arrays
    assert np.array_equal(room.arrays[0], W_VALUES)


def test_after_a_refusal_nothing_more_of_the_step_is_sent() -> None:
    step = step_of()
    requests = step.requests()
    next(requests)
    next(requests)
    assert step.receive(refused())
    assert step.refusal == refused().refused.refusal
    assert list(requests) == []


NOT_UNDERSTOOD: dict[str, list[TrainAnswer]] = {
    "begin-of-another-step": [begin(step=2)],
    "result-of-another-step": [begin(), both_parameters(), result(step=2)],
    "refusal-of-another-step": [refused(step=9)],
    "other-parameters": [begin(parameters=[W])],
    "parameters-of-another-shape": [
        begin(parameters=[TensorHeader(name="w", data_type=DataType.DATA_TYPE_FP32, shape=[5]), B])
    ],
    "packed": [packed(W_VALUES.tobytes(), B_VALUE.tobytes())],
    "second-begin-of-another-step": [begin(), begin(step=4)],
    "chunks-before-the-begin": [both_parameters()],
    "result-before-the-begin": [result()],
    "result-before-the-last-byte": [begin(), result()],
    "overlap": [
        begin(),
        chunks((0, 0, b"1234")),
        chunks((0, 0, b"1234")),
    ],
    "overrun": [begin(), chunks((1, 0, b"12345"))],
    "empty-event": [pb.TrainResponse()],
}


@pytest.mark.parametrize("responses", NOT_UNDERSTOOD.values(), ids=NOT_UNDERSTOOD.keys())
def test_an_answer_that_the_contract_does_not_allow_is_not_understood(
    responses: list[TrainAnswer],
) -> None:
    step = step_of()
    for response in responses[:-1]:
        assert not step.receive(response)
    with pytest.raises(ProtocolError):
        step.receive(responses[-1])
    assert step.parameters is None


NOT_UNDERSTOOD_WHEN_PACKED: dict[str, TrainAnswer] = {
    "parameters-of-another-step": packed(W_VALUES.tobytes(), B_VALUE.tobytes(), step=2),
    "refusal-of-another-step": refused(step=2),
    "too-few-parameters": packed(W_VALUES.tobytes()),
    "too-many-parameters": packed(W_VALUES.tobytes(), B_VALUE.tobytes(), b""),
    "too-few-bytes": packed(W_VALUES.tobytes(), b"123"),
    "too-many-bytes": packed(W_VALUES.tobytes(), b"12345"),
    "begin": begin(parameters=[]),
    "result": result(),
    "chunks": both_parameters(),
    "empty-event": pb.TrainResponse(),
}


@pytest.mark.parametrize(
    "response", NOT_UNDERSTOOD_WHEN_PACKED.values(), ids=NOT_UNDERSTOOD_WHEN_PACKED.keys()
)
def test_an_answer_to_a_packed_step_that_the_contract_does_not_allow_is_not_understood(
    response: TrainAnswer,
) -> None:
    step = packed_step()
    with pytest.raises(ProtocolError):
        step.receive(response)
    assert step.parameters is None
    assert step.result is None
    assert step.refusal is None


def test_a_download_gives_what_was_asked_for_and_counts_its_bytes() -> None:
    counted: list[int] = []
    download = Download([W, B], counted.append)
    begin = pb.DownloadBegin(steps=8, parameters=[W, B])
    download.receive(pb.DownloadParametersResponse(begin=begin))
    download.receive(both_parameters())
    w, b = download.finish()
    assert np.array_equal(w, W_VALUES)
    assert b == B_VALUE
    assert (download.steps, counted) == (8, [20])


def test_a_download_that_never_begins_is_not_understood() -> None:
    with pytest.raises(ProtocolError, match="before it began"):
        Download([W]).finish()


def test_an_upload_counts_every_byte_once() -> None:
    counted: list[int] = []
    begin = pb.UploadBegin(session_id="id", parameters=[W, B])
    tensors = [source_of(W_VALUES), source_of(np.asarray(B_VALUE))]
    requests = list(upload_requests(begin, tensors, chunk_bytes=8, advance=counted.append))
    assert requests[0] == pb.UploadParametersRequest(begin=begin)
    assert data_of(requests) == W_VALUES.tobytes() + B_VALUE.tobytes()
    assert counted == [8, 8, 4]


def loss_of(predictions: TensorHeader = W) -> LossEvaluation:
    targets = TensorHeader(data_type=DataType.DATA_TYPE_INT64, shape=[1])
    begin = pb.LossBegin(session_id="id", predictions=predictions, targets=targets)
    tensors = [source_of(W_VALUES), source_of(np.zeros(1, np.int64))]
    return LossEvaluation(begin, tensors, chunk_bytes=1024)


def evaluated(*tensors: TensorHeader) -> pb.EvaluateLossStreamResponse:
    event = pb.LossEvaluated(result=pb.LossResult(loss=0.5), tensors=tensors)
    return pb.EvaluateLossStreamResponse(evaluated=event)


def test_a_loss_answers_with_the_gradient_by_name() -> None:
    evaluation = loss_of()
    assert events_of(evaluation.requests()) == ["begin", "chunks"]
    gradient = TensorHeader(name="gradient", data_type=W.data_type, shape=[4])
    evaluation.receive(evaluated(gradient))
    evaluation.receive(chunks((0, 0, W_VALUES.tobytes())))
    assert np.array_equal(evaluation.finish()["gradient"], W_VALUES)
    assert evaluation.result == pb.LossResult(loss=0.5)


@pytest.mark.parametrize(
    "header",
    [
        TensorHeader(name="gradient", data_type=W.data_type, shape=[1 << 40]),
        TensorHeader(name="gradient", data_type=DataType.DATA_TYPE_FP64, shape=[4]),
        TensorHeader(name="elements", data_type=W.data_type, shape=[5]),
        TensorHeader(name="elements", data_type=W.data_type, shape=[-1, -4]),
    ],
    ids=["huge-gradient", "wider-gradient", "more-elements", "negative-shape"],
)
def test_no_memory_is_taken_for_a_tensor_that_does_not_belong_to_the_loss(
    header: TensorHeader,
) -> None:
    with pytest.raises(ProtocolError, match="does not belong"):
        loss_of().receive(evaluated(header))
