"""EvaluateLoss, in one message and as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from torch import Tensor

from optserve.limits import MESSAGE_HEADROOM_BYTES
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.wire import Chunk
from optserve_server.core import evaluation
from optserve_server.core.actor import SessionActor
from optserve_server.core.admission import evaluation_bytes, walked_bytes
from optserve_server.core.errors import LimitExceededError, MissingFieldError
from optserve_server.core.events import Direction
from optserve_server.core.losses import LossOutcome
from optserve_server.core.spec import Split
from optserve_server.core.tenant import TenantRegistry
from optserve_server.core.tensors import TensorSpec, spec_of
from optserve_server.rpc import decode, encode, transfer

_Context = grpc.aio.ServicerContext[Any, Any]


async def evaluate(
    request: pb.EvaluateLossRequest, registry: TenantRegistry
) -> pb.EvaluateLossResponse:
    """Evaluate what came in one message.

    Raises:
        OptserveError: It does not fit the session's loss.
    """
    limits = registry.limits
    actor = await registry.find(request.session_id)
    _check_there(request, "")
    specs = [
        decode.tensor_spec(request.predictions.header, limits, "predictions.header"),
        decode.tensor_spec(request.targets.header, limits, "targets.header"),
    ]
    decode.check_byte_count(specs[0], len(request.predictions.data), "predictions.data")
    decode.check_byte_count(specs[1], len(request.targets.data), "targets.data")
    _check_answer_fits(actor, request, specs[0], limits.message_bytes_max - MESSAGE_HEADROOM_BYTES)
    with registry.budget.reserved(
        _bytes_of(specs, registry), what="the evaluation", field="predictions"
    ):
        predictions = decode.tensor(request.predictions, limits, "predictions")
        targets = decode.tensor(request.targets, limits, "targets")
        outcome = await _evaluate(actor, request, predictions, targets, registry)
        tensors = _tensors(outcome)
        registry.surroundings.observer.bytes_moved(
            Direction.SENT, sum(each.nbytes for each in tensors.values())
        )
        return pb.EvaluateLossResponse(
            result=encode.loss_result(outcome, actor.view.steps),
            **{name: encode.tensor(name, tensor) for name, tensor in tensors.items()},
        )


async def evaluate_stream(
    requests: AsyncIterator[pb.EvaluateLossStreamRequest | list[Chunk]],
    context: _Context,
    registry: TenantRegistry,
) -> None:
    """Evaluate what comes in chunks, and answer in chunks.

    Raises:
        OptserveError: It does not fit the session's loss.
    """
    limits = registry.limits
    begin = (await transfer.first(requests, "an evaluation", "begin", limits)).begin
    actor = await registry.find(begin.session_id)
    _check_there(begin, "begin.")
    specs = [
        decode.tensor_spec(begin.predictions, limits, "begin.predictions"),
        decode.tensor_spec(begin.targets, limits, "begin.targets"),
    ]
    with registry.budget.reserved(
        _bytes_of(specs, registry), what="the evaluation", field="begin.predictions"
    ):
        received = [registry.surroundings.device.staging(spec) for spec in specs]
        receiver = transfer.Receiver(transfer.buffers(received), _field_of, limits)
        size = sum(spec.byte_count for spec in specs)
        with actor.in_use():
            async with transfer.on_the_whole(size, limits):
                await transfer.receive(requests, receiver, limits)
        outcome = await _evaluate(actor, begin, received[0], received[1], registry)
        tensors = _tensors(outcome)
        evaluated = pb.LossEvaluated(
            result=encode.loss_result(outcome, actor.view.steps),
            tensors=[
                encode.tensor_header(spec_of(name, tensor)) for name, tensor in tensors.items()
            ],
        )
        size = sum(tensor.nbytes for tensor in tensors.values())
        async with transfer.on_the_whole(size, limits):
            response = pb.EvaluateLossStreamResponse(evaluated=evaluated)
            await transfer.in_time(context.write(response), limits)
            sources = transfer.buffers(tensors.values())
            count = await transfer.send(sources, context.write, limits)
        registry.surroundings.observer.bytes_moved(Direction.SENT, count)


def _field_of(tensor: int) -> str:
    """Return the field of LossBegin that announced a tensor; for one that none did, the chunks."""
    return ("begin.predictions", "begin.targets", "chunks")[min(tensor, 2)]


def _check_there(request: pb.EvaluateLossRequest | pb.LossBegin, path: str) -> None:
    for field in ("predictions", "targets"):
        if not request.HasField(field):
            raise MissingFieldError(
                f"an evaluation needs {field}", field=path + field, expected="a tensor"
            )


def _check_answer_fits(
    actor: SessionActor, request: pb.EvaluateLossRequest, predictions: TensorSpec, bytes_max: int
) -> None:
    """Make sure that gradient and elements fit into the answer, before they are computed."""
    loss = actor.spec.loss
    elementwise = loss is not None and loss.arguments.get("reduction") == "none"
    count = predictions.byte_count * (_wants(request) + elementwise)
    if count > bytes_max:
        raise LimitExceededError(
            f"gradient and elements would have {count} bytes; use EvaluateLossStream",
            field="predictions",
            expected=f"at most {bytes_max} bytes",
            actual=f"{count} bytes",
        )


def _wants(request: pb.EvaluateLossRequest | pb.LossBegin) -> bool:
    """Return whether the gradient is asked for: by itself for training data only."""
    if request.HasField("gradient"):
        return request.gradient
    return decode.split(request.split) is Split.TRAIN


def _bytes_of(specs: list[TensorSpec], registry: TenantRegistry) -> int:
    """Return how much memory an evaluation takes.

    Raises:
        LimitExceededError: Predictions and targets are larger than allowed.
    """
    most, count = registry.limits.loss_bytes_max, sum(walked_bytes(spec) for spec in specs)
    if count > most:
        raise LimitExceededError(
            f"predictions and targets have {count} bytes; {most} are allowed",
            field="predictions",
            expected=f"at most {most} bytes",
            actual=f"{count} bytes",
        )
    return evaluation_bytes(*specs)


async def _evaluate(
    actor: SessionActor,
    request: pb.EvaluateLossRequest | pb.LossBegin,
    predictions: Tensor,
    targets: Tensor,
    registry: TenantRegistry,
) -> LossOutcome:
    registry.surroundings.observer.bytes_moved(
        Direction.RECEIVED, predictions.nbytes + targets.nbytes
    )
    return await evaluation.evaluate(
        actor, decode.split(request.split), predictions, targets, with_gradient=_wants(request)
    )


def _tensors(outcome: LossOutcome) -> dict[str, Tensor]:
    """Return the tensors of an answer by the names that the contract gives them."""
    tensors = {"gradient": outcome.gradient, "elements": outcome.elements}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
