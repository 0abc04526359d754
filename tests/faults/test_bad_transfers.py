"""Tensors that come wrongly, in uploads and in evaluations. Nothing of them stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import grpc
import pytest
import torch
from event_loop import TIMEOUT_S
from faults.framing import FRAMING, HEADERS, LARGE, W_BYTES, B, W, chunks_at, large_session
from faults.ground import CLASSES, Ground, Mistakes
from messages import header_of
from refusals import translated

from optserve.limits import CHUNK_BYTES_MAX
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.tensor_pb2 import TensorChunks, TensorHeader


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
    chunks = pb.UploadParametersRequest(chunks=chunks_at((0, 0, W_BYTES)))
    nothing = pb.UploadParametersRequest()
    for requests in ([], [chunks], [nothing], [begin, begin], [begin, chunks, nothing]):
        with mistakes.refused("EVENT_OUT_OF_ORDER", "event"):
            _upload(mistakes.ground, *requests)
    with mistakes.refused("MISSING_FIELD", "begin.parameters"):
        _upload(mistakes.ground, _upload_begin(mistakes.ground, []))


def test_more_bytes_in_a_message_than_allowed_are_refused(mistakes: Mistakes) -> None:
    with large_session(mistakes.ground) as session_id:
        begin = pb.UploadBegin(session_id=session_id, parameters=[LARGE])
        chunks = chunks_at((0, 0, bytes(CHUNK_BYTES_MAX + 4)))
        with mistakes.refused("LIMIT_EXCEEDED", "chunks"):
            _upload(
                mistakes.ground,
                pb.UploadParametersRequest(begin=begin),
                pb.UploadParametersRequest(chunks=chunks),
            )


def test_an_upload_that_is_broken_off_changes_nothing(mistakes: Mistakes) -> None:
    ground = mistakes.ground
    before = ground.look()

    def requests() -> Iterator[pb.UploadParametersRequest]:
        yield _upload_begin(ground, [W, B])
        yield pb.UploadParametersRequest(chunks=chunks_at((0, 0, bytes(len(W_BYTES)))))
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
    "tensor-not-announced": ([chunks_at((2, 0, b"a"))], "CHUNK_OUT_OF_ORDER", "chunks"),
    "gap": ([chunks_at((1, 8, b"a"))], "CHUNK_OUT_OF_ORDER", "begin.targets"),
    "bytes-too-many": ([chunks_at((0, 0, bytes(65)))], "BYTE_COUNT_MISMATCH", "begin.predictions"),
    "bytes-missing": ([chunks_at((0, 0, bytes(64)))], "BYTE_COUNT_MISMATCH", "begin.targets"),
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
        _evaluate(mistakes.ground, None, chunks_at((0, 0, b"a")))
    for begin, missing in (
        (pb.LossBegin(targets=header_of("", LABELS)), "predictions"),
        (pb.LossBegin(predictions=header_of("", LOGITS)), "targets"),
    ):
        with mistakes.refused("MISSING_FIELD", f"begin.{missing}"):
            _evaluate(mistakes.ground, begin)
