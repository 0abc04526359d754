"""Train and Step: one worker's steps, on a stream or one in a message.

Both take the same way to a commit.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.tensor_pb2 import Tensor, TensorChunks
from optserve_server.core.actor import Attachment, SessionActor
from optserve_server.core.errors import (
    DrainingError,
    EventOutOfOrderError,
    LimitExceededError,
    OptserveError,
    SessionDeletedError,
    StalledError,
)
from optserve_server.core.events import Direction, Phase
from optserve_server.core.registry import SessionRegistry
from optserve_server.core.round import Contribution
from optserve_server.core.tensors import TensorSpec, byte_view
from optserve_server.rpc import decode, encode, status, transfer

_Context = grpc.aio.ServicerContext[Any, Any]
_Requests = AsyncIterator[pb.TrainRequest]

_TAG_BYTES = 16  # At most, around the data of one tensor: tags and lengths.
_RESULT_BYTES = 64  # At most, of a result's numbers.

# Every other refusal is of one step.
_ENDS_STREAM = (DrainingError, EventOutOfOrderError, SessionDeletedError, StalledError)


async def train(requests: _Requests, context: _Context, registry: SessionRegistry) -> None:
    """Serve one worker's stream until the client half-closes.

    Raises:
        OptserveError: The stream cannot be opened, or cannot go on.
    """
    first = await transfer.first(requests, "open", registry.limits)
    if first.WhichOneof("event") != "open":
        raise EventOutOfOrderError("a stream begins with `open`", field="event", expected="open")
    actor = registry.find(first.open.session_id)
    with actor.attach(first.open.worker) as attachment:
        opened = pb.TrainOpened(status=encode.session_status(actor))
        await context.write(pb.TrainResponse(opened=opened))
        stream = _WorkerStream(requests, context, actor, first.open.worker, registry)
        await stream.run(attachment)


async def step(request: pb.StepRequest, registry: SessionRegistry) -> pb.StepResponse:
    """Take a step that came in one message.

    Raises:
        OptserveError: It cannot be taken. Nothing was changed.
    """
    limits, observer = registry.limits, registry.surroundings.observer
    registry.check_accepting()
    actor = registry.find(request.session_id)
    _check_answer_fits(actor, limits.message_bytes_max)
    specs = decode.tensor_specs([each.header for each in request.gradients], limits, "gradients")
    with actor.attach(request.worker):
        started = time.perf_counter()
        contribution = actor.begin(request.worker, request.step, specs)
        count = _fill(contribution, request, specs)
        observer.phase_ended(Phase.RECEIVE, time.perf_counter() - started)
        observer.bytes_moved(Direction.RECEIVED, count)
        outcome, replayed = await actor.commit(contribution)
        started = time.perf_counter()
        async with actor.reading() as parameters:
            named = zip(actor.session.spec.parameters, parameters, strict=True)
            response = pb.StepResponse(
                result=encode.step_result(outcome, replayed=replayed),
                parameters=[encode.tensor(spec.name, parameter) for spec, parameter in named],
            )
        observer.phase_ended(Phase.SEND, time.perf_counter() - started)
        observer.bytes_moved(Direction.SENT, sum(len(each.data) for each in response.parameters))
        return response


class _WorkerStream:
    """The events of one worker, in their order: begin, chunks, end; and again."""

    def __init__(
        self,
        requests: _Requests,
        context: _Context,
        actor: SessionActor,
        worker: int,
        registry: SessionRegistry,
    ) -> None:
        self._requests = requests
        self._context = context
        self._actor = actor
        self._worker = worker
        self._registry = registry
        self._limits = registry.limits
        self._observer = registry.surroundings.observer
        self._headers = [encode.tensor_header(spec) for spec in actor.session.spec.parameters]
        self._contribution: Contribution | None = None
        self._receiver: transfer.Receiver | None = None
        self._refused = False
        self._step = 0
        self._started = 0.0
        self._received_bytes = 0

    async def run(self, attachment: Attachment) -> None:
        """Serve until the client half-closes.

        Raises:
            OptserveError: The stream cannot go on.
        """
        while (request := await self._next(attachment)) is not None:
            try:
                await self._take(request)
            except _ENDS_STREAM:
                raise
            except OptserveError as error:
                await self._refuse(error)

    async def _next(self, attachment: Attachment) -> pb.TrainRequest | None:
        """Return the next event; None at the half-close.

        Between two steps the stream may rest for ever, unless the server drains.
        """
        if self._contribution is None:
            self._registry.check_accepting()
            attachment.resting = True
            request = await anext(self._requests, None)
            attachment.resting = False
            return request
        return await transfer.next_or_none(self._requests, self._limits)

    async def _take(self, request: pb.TrainRequest) -> None:
        event = request.WhichOneof("event")
        if event == "begin":
            self._begin(request.begin)
        elif event == "chunks" and self._contribution:
            if self._receiver:
                self._received_bytes += self._receiver.add(request.chunks)
        elif event == "end" and self._contribution:
            await self._end(self._contribution)
        elif event in ("chunks", "end") and self._refused:
            pass  # Sent before the client knew.
        else:
            expected = "chunks or end" if self._contribution else "begin"
            raise EventOutOfOrderError(
                f"{event or 'nothing'!r} cannot come here",
                field="event",
                expected=expected,
                actual=event or "",
            )

    def _begin(self, begin: pb.StepBegin) -> None:
        self._contribution, self._step, self._refused = None, begin.step, False
        self._registry.check_accepting()
        specs = decode.tensor_specs(begin.gradients, self._limits, "gradients")
        self._contribution = self._actor.begin(self._worker, begin.step, specs)
        settled = self._contribution.settled is not None
        self._receiver = (
            None
            if settled
            else transfer.Receiver(self._contribution.targets, "gradients[{}]".format, self._limits)
        )
        self._started, self._received_bytes = time.perf_counter(), 0

    async def _end(self, contribution: Contribution) -> None:
        if self._receiver:
            self._receiver.finish()
        self._contribution = None
        self._observer.phase_ended(Phase.RECEIVE, time.perf_counter() - self._started)
        self._observer.bytes_moved(Direction.RECEIVED, self._received_bytes)
        outcome, replayed = await self._actor.commit(contribution)
        started = time.perf_counter()
        async with self._actor.reading() as parameters:
            begin = pb.ParametersBegin(step=outcome.step, parameters=self._headers)
            await self._write(pb.TrainResponse(begin=begin))
            count = await transfer.send(parameters, self._write_chunks, self._limits)
            result = encode.step_result(outcome, replayed=replayed)
            await self._write(pb.TrainResponse(result=result))
        self._observer.phase_ended(Phase.SEND, time.perf_counter() - started)
        self._observer.bytes_moved(Direction.SENT, count)

    async def _write(self, response: pb.TrainResponse) -> None:
        await transfer.in_time(self._context.write(response), self._limits)

    async def _write_chunks(self, chunks: TensorChunks) -> None:
        await self._context.write(pb.TrainResponse(chunks=chunks))

    async def _refuse(self, error: OptserveError) -> None:
        self._contribution, self._refused = None, True
        self._observer.refused(status.reason_of(error))
        refused = pb.StepRefused(step=self._step, refusal=status.refusal(error))
        await self._write(pb.TrainResponse(refused=refused))


def _check_answer_fits(actor: SessionActor, message_bytes_max: int) -> None:
    """Make sure that the answer fits into a message, before the step is made."""
    specs = actor.spec.parameters
    empty = pb.StepResponse(
        result=pb.StepResult(rates=encode.group_rates(actor.view.rates)),
        parameters=[Tensor(header=encode.tensor_header(spec)) for spec in specs],
    )
    count = empty.ByteSize() + sum(spec.byte_count + _TAG_BYTES for spec in specs) + _RESULT_BYTES
    if count > message_bytes_max:
        raise LimitExceededError(
            f"the answer would have {count} bytes; use Train",
            expected=f"at most {message_bytes_max} bytes",
            actual=f"{count} bytes",
        )


def _fill(contribution: Contribution, request: pb.StepRequest, specs: Sequence[TensorSpec]) -> int:
    """Copy the message's gradients to where the contribution wants them.

    Return how many bytes they are.
    """
    for i, (spec, gradient) in enumerate(zip(specs, request.gradients, strict=True)):
        data = gradient.data
        decode.check_byte_count(spec, len(data), f"gradients[{i}].data")
        if contribution.settled is None:
            byte_view(contribution.targets[i])[:] = data
    return sum(spec.byte_count for spec in specs)
