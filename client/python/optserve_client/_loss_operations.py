"""The operations on a session's loss and its history, without I/O: what both faces share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from numpy.typing import ArrayLike

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.session_pb2 import Split as SplitMessage
from optserve.wire import Buffer
from optserve_client._effects import Collect, Operation
from optserve_client._exchange import INLINE_BYTES_MAX, LossEvaluation, check_loss_tensor
from optserve_client._session_operations import SessionOperations
from optserve_client._spec import Via
from optserve_client.results import (
    SPLITS,
    LossHistory,
    LossPoint,
    LossResult,
    Split,
    loss_point,
    loss_result,
)
from optserve_client.tensors import Array, encode, from_tensor, messages


def evaluate_loss(
    session: SessionOperations,
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    split: Split | None,
    gradient: bool | None,
    via: Via | None,
) -> Operation[LossResult]:
    """Evaluate the session's loss; if ``via`` is None, small tensors travel in one message.

    It is evaluated again when its answer is lost, and then stands twice in the history.
    """
    prediction_header, prediction_bytes = encode("", predictions, path="predictions")
    target_header, target_bytes = encode("", targets, path="targets")
    begin = pb.LossBegin(
        session_id=session.session_id,
        split=_split_message(split),
        gradient=gradient,
        predictions=prediction_header,
        targets=target_header,
    )
    if via is None:
        small = len(prediction_bytes) + len(target_bytes) <= INLINE_BYTES_MAX
        via = "unary" if small else "stream"
    if via == "unary":
        return (yield from _evaluate_unary(session, begin, (prediction_bytes, target_bytes)))
    attempt = partial(_evaluate_stream, session, begin, (prediction_bytes, target_bytes))
    return (yield from session.terms.outages.persist(attempt))


def loss_points(
    session: SessionOperations, split: Split | None, page_size: int
) -> Operation[LossHistory]:
    """Read all that the session keeps, page by page; a page size of 0 is the server's."""
    points: list[LossPoint] = []
    request = pb.ListLossPointsRequest(
        session_id=session.session_id, split=_split_message(split), page_size=page_size
    )
    while True:
        page = yield from session.terms.ask("ListLossPoints", request, pb.ListLossPointsResponse)
        points.extend(loss_point(point) for point in page.points)
        if not page.next_page_token:
            return LossHistory(points, forgotten=page.forgotten)
        request.page_token = page.next_page_token


def _evaluate_unary(
    session: SessionOperations, begin: pb.LossBegin, tensors: Sequence[memoryview]
) -> Operation[LossResult]:
    predictions, targets = messages((begin.predictions, begin.targets), tensors)
    request = pb.EvaluateLossRequest(
        session_id=begin.session_id,
        split=begin.split,
        gradient=begin.gradient if begin.HasField("gradient") else None,
        predictions=predictions,
        targets=targets,
    )
    response = yield from session.terms.ask("EvaluateLoss", request, pb.EvaluateLossResponse)
    arrays: dict[str, Array] = {}
    for name, tensor in (("gradient", response.gradient), ("elements", response.elements)):
        if tensor.HasField("header"):
            check_loss_tensor(name, tensor.header, begin.predictions)
            arrays[name] = from_tensor(tensor)
    return loss_result(response.result, arrays)


def _evaluate_stream(
    session: SessionOperations, begin: pb.LossBegin, tensors: Sequence[memoryview]
) -> Operation[LossResult]:
    sources = [Buffer(tensor) for tensor in tensors]
    evaluation = LossEvaluation(begin, sources, chunk_bytes=session.terms.chunk_bytes)
    yield Collect(
        rpc="EvaluateLossStream",
        request=evaluation.requests(),
        receive=evaluation.receive,
        timeout_s=session.terms.config.transfer_timeout_s,
    )
    arrays = evaluation.finish()
    assert evaluation.result is not None
    return loss_result(evaluation.result, arrays)


def _split_message(split: Split | None) -> SplitMessage.ValueType:
    if split is None:
        return SplitMessage.SPLIT_UNSPECIFIED
    if split not in SPLITS:
        raise ValueError(f"split must be 'train', 'validation' or None, not {split!r}")
    return SPLITS[split]
