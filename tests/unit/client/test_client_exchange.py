from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.error_pb2 import Reason, Refusal
from optserve.v1.session_pb2 import SessionStatus
from optserve.v1.tensor_pb2 import DataType, TensorChunk, TensorChunks, TensorHeader
from optserve_client._exchange import (
    Download,
    LossEvaluation,
    Opening,
    Step,
    upload_requests,
)
from optserve_client.errors import ProtocolError

W = TensorHeader(name="w", data_type=DataType.DATA_TYPE_FP32, shape=[4])
B = TensorHeader(name="b", data_type=DataType.DATA_TYPE_FP32, shape=[])
W_VALUES, B_VALUE = np.arange(4, dtype=np.float32), np.float32(7)


def chunks(*parts: tuple[int, int, bytes]) -> TensorChunks:
    return TensorChunks(
        chunks=[TensorChunk(tensor=at, offset=offset, data=data) for at, offset, data in parts]
    )


def both_parameters() -> TensorChunks:
    return chunks((0, 0, W_VALUES.tobytes()), (1, 0, B_VALUE.tobytes()))


def step_of(gradient: np.ndarray[tuple[int], np.dtype[np.float32]] = W_VALUES) -> Step:
    announced = pb.StepBegin(step=3, gradients=[W])
    data = gradient.view(np.uint8).data
    return Step(announced, [data], [W, B], chunk_bytes=8)


def begin(step: int = 3, parameters: Sequence[TensorHeader] = (W, B)) -> pb.TrainResponse:
    return pb.TrainResponse(begin=pb.ParametersBegin(step=step, parameters=parameters))


def result(step: int = 3) -> pb.TrainResponse:
    return pb.TrainResponse(result=pb.StepResult(step=step))


def refused(step: int = 3) -> pb.TrainResponse:
    refusal = Refusal(reason=Reason.REASON_NON_FINITE_GRADIENT, message="no")
    return pb.TrainResponse(refused=pb.StepRefused(step=step, refusal=refusal))


def test_a_stream_opens_with_the_session_and_the_worker() -> None:
    opening = Opening("id", 2)
    (request,) = opening.requests()
    assert request == pb.TrainRequest(open=pb.TrainOpen(session_id="id", worker=2))
    status = SessionStatus(session_id="id", steps=5)
    assert opening.receive(pb.TrainResponse(opened=pb.TrainOpened(status=status)))
    assert opening.status == status


def test_a_stream_that_opens_with_something_else_is_not_understood() -> None:
    with pytest.raises(ProtocolError, match="sent result where opened"):
        Opening("id", 0).receive(result())


def test_a_step_is_sent_as_begin_chunks_end() -> None:
    requests = list(step_of().requests())
    assert [request.WhichOneof("event") for request in requests] == [
        "begin",
        "chunks",
        "chunks",
        "end",
    ]
    sent = b"".join(chunk.data for r in requests for chunk in r.chunks.chunks)
    assert sent == W_VALUES.tobytes()


def test_a_step_is_over_with_its_result_and_its_parameters_are_read_only() -> None:
    step = step_of()
    assert not step.receive(begin())
    assert not step.receive(pb.TrainResponse(chunks=both_parameters()))
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
    step.receive(pb.TrainResponse(chunks=chunks((1, 0, B_VALUE.tobytes()))))
    assert [request.WhichOneof("event") for request in requests] == ["chunks", "chunks", "end"]
    step.receive(pb.TrainResponse(chunks=chunks((0, 0, W_VALUES.tobytes()))))
    assert step.receive(result())


def test_a_refusal_takes_back_the_parameters_that_had_come() -> None:
    step = step_of()
    step.receive(begin())
    step.receive(pb.TrainResponse(chunks=both_parameters()))
    assert step.receive(refused())
    assert step.refusal == refused().refused.refusal
    assert step.parameters is None
    assert step.result is None


def test_after_a_refusal_nothing_more_of_the_step_is_sent() -> None:
    step = step_of()
    requests = step.requests()
    next(requests)
    next(requests)
    assert step.receive(refused())
    assert step.refusal == refused().refused.refusal
    assert list(requests) == []


NOT_UNDERSTOOD = {
    "begin-of-another-step": [begin(step=2)],
    "result-of-another-step": [begin(), pb.TrainResponse(chunks=both_parameters()), result(step=2)],
    "refusal-of-another-step": [refused(step=9)],
    "other-parameters": [begin(parameters=[W])],
    "parameters-of-another-shape": [
        begin(parameters=[TensorHeader(name="w", data_type=DataType.DATA_TYPE_FP32, shape=[5]), B])
    ],
    "two-begins": [begin(), begin()],
    "chunks-before-the-begin": [pb.TrainResponse(chunks=both_parameters())],
    "result-before-the-begin": [result()],
    "result-before-the-last-byte": [begin(), result()],
    "overlap": [
        begin(),
        pb.TrainResponse(chunks=chunks((0, 0, b"1234"))),
        pb.TrainResponse(chunks=chunks((0, 0, b"1234"))),
    ],
    "overrun": [begin(), pb.TrainResponse(chunks=chunks((1, 0, b"12345")))],
    "empty-event": [pb.TrainResponse()],
}


@pytest.mark.parametrize("responses", NOT_UNDERSTOOD.values(), ids=NOT_UNDERSTOOD.keys())
def test_an_answer_that_the_contract_does_not_allow_is_not_understood(
    responses: list[pb.TrainResponse],
) -> None:
    step = step_of()
    for response in responses[:-1]:
        assert not step.receive(response)
    with pytest.raises(ProtocolError):
        step.receive(responses[-1])
    assert step.parameters is None


def test_a_download_gives_what_was_asked_for_and_counts_its_bytes() -> None:
    counted: list[int] = []
    download = Download([W, B], counted.append)
    begin = pb.DownloadBegin(steps=8, parameters=[W, B])
    download.receive(pb.DownloadParametersResponse(begin=begin))
    download.receive(pb.DownloadParametersResponse(chunks=both_parameters()))
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
    data = [W_VALUES.view(np.uint8).data, np.array([B_VALUE]).view(np.uint8).data]
    requests = list(upload_requests(begin, data, chunk_bytes=8, advance=counted.append))
    assert requests[0].begin == begin
    assert sum(len(c.data) for r in requests for c in r.chunks.chunks) == 20
    assert counted == [8, 8, 4]


def loss_of(predictions: TensorHeader = W) -> LossEvaluation:
    targets = TensorHeader(data_type=DataType.DATA_TYPE_INT64, shape=[1])
    begin = pb.LossBegin(session_id="id", predictions=predictions, targets=targets)
    data = [W_VALUES.view(np.uint8).data, np.zeros(1, np.int64).view(np.uint8).data]
    return LossEvaluation(begin, data, chunk_bytes=1024)


def evaluated(*tensors: TensorHeader) -> pb.EvaluateLossStreamResponse:
    event = pb.LossEvaluated(result=pb.LossResult(loss=0.5), tensors=tensors)
    return pb.EvaluateLossStreamResponse(evaluated=event)


def test_a_loss_answers_with_the_gradient_by_name() -> None:
    evaluation = loss_of()
    assert [r.WhichOneof("event") for r in evaluation.requests()] == ["begin", "chunks"]
    gradient = TensorHeader(name="gradient", data_type=W.data_type, shape=[4])
    evaluation.receive(evaluated(gradient))
    evaluation.receive(pb.EvaluateLossStreamResponse(chunks=chunks((0, 0, W_VALUES.tobytes()))))
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
