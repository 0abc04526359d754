"""Train: one worker's steps on a stream, for as long as it likes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from typing import Any

import grpc
from torch import Tensor

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.wire import Chunk, whole
from optserve_server.core.actor import SessionActor
from optserve_server.core.errors import (
    DrainingError,
    EventOutOfOrderError,
    InvalidFieldError,
    MemoryExhaustedError,
    OptserveError,
    SessionDeletedError,
    StalledError,
)
from optserve_server.core.events import Direction, Phase
from optserve_server.core.seats import Seat
from optserve_server.core.surroundings import Overlap
from optserve_server.core.tenant import TenantRegistry
from optserve_server.rpc import decode, encode, encoded, shared_memory, status, transfer
from optserve_server.rpc.ahead import MEMORY_BYTES, Ahead
from optserve_server.rpc.open_step import OpenStep
from optserve_server.rpc.packed import PackedForm

_Context = grpc.aio.ServicerContext[Any, Any]
_Event = pb.TrainRequest | list[Chunk]
_Requests = AsyncIterator[_Event]

# Every other refusal is of one step.
_ENDS_STREAM = (DrainingError, EventOutOfOrderError, SessionDeletedError, StalledError)

# Smaller steps are over before it pays to answer them ahead of their results.
_AHEAD_FROM_BYTES = 2 << 20


async def train(requests: _Requests, context: _Context, registry: TenantRegistry) -> None:
    """Serve one worker's stream until the client half-closes.

    Raises:
        OptserveError: The stream cannot be opened, or cannot go on.
    """
    opening = (await transfer.first(requests, "a stream", "open", registry.limits)).open
    client_id = decode.client_id(opening.client_id, "open.client_id")
    actor = await registry.find(opening.session_id)
    registry.check_accepting()  # Or a step that may still be finished would be broken off.
    await actor.vacate(opening.worker, client_id)
    with actor.attach(opening.worker, client_id) as seat:
        offer = None
        if opening.shared_memory:
            offer = await shared_memory.offer(registry, actor, opening.worker, context.peer())
        last = actor.last_contribution(opening.worker)
        opened = pb.TrainOpened(
            status=encode.session_status(actor),
            shared_memory=offer,
            contribution=encode.contribution(last) if last else None,
        )
        await context.write(pb.TrainResponse(opened=opened))
        stream = _WorkerStream(requests, context, actor, opening.worker, registry)
        await stream.run(seat, overlaps=_overlaps(registry, actor, context.peer()))


def _overlaps(registry: TenantRegistry, actor: SessionActor, peer: str) -> bool:
    """Return whether to answer a peer's steps ahead of their results."""
    overlap, spec = registry.surroundings.overlap, actor.spec
    wanted = overlap is Overlap.ON or (overlap is Overlap.AUTO and not shared_memory.is_local(peer))
    size = sum(parameter.byte_count for parameter in spec.parameters)
    return wanted and spec.workers == 1 and size > _AHEAD_FROM_BYTES


class _WorkerStream:
    """The events of one worker, in their order: begin, chunks, end, or packed; and again."""

    def __init__(
        self,
        requests: _Requests,
        context: _Context,
        actor: SessionActor,
        worker: int,
        registry: TenantRegistry,
    ) -> None:
        self._requests = requests
        self._context = context
        self._actor = actor
        self._worker = worker
        self._registry = registry
        self._limits = registry.limits
        self._observer = registry.surroundings.observer
        self._headers = [encode.tensor_header(spec) for spec in actor.session.spec.parameters]
        self._byte_count = sum(spec.byte_count for spec in actor.spec.parameters)
        self._packed = PackedForm(actor.spec, registry.limits)
        self._targets = encoded.GradientTargets(actor.spec.wire.gradients)
        self._sources = encoded.ParameterSources(actor.spec.wire.parameters)
        self._step: OpenStep | None = None
        self._ahead: Ahead | None = None
        self._void: Ahead | None = None  # Given up, and perhaps still on its way.
        self._room = ExitStack()  # For one of them at a time; none while the stream rests.
        self._overlaps = False
        self._number = 0
        self._refused = False

    async def run(self, seat: Seat, *, overlaps: bool) -> None:
        """Serve until the client half-closes.

        Args:
            seat: The worker's.
            overlaps: Whether to answer steps while their gradients still arrive.

        Raises:
            OptserveError: The stream cannot go on.
        """
        self._overlaps = overlaps
        try:
            while (event := await self._next(seat)) is not None:
                try:
                    await self._take(event)
                except _ENDS_STREAM:
                    raise
                except OptserveError as error:
                    await self._refuse(error)
        finally:
            for ahead in (self._ahead, self._void):
                if ahead:
                    await ahead.cancel()
            self._room.close()

    async def _next(self, seat: Seat) -> _Event | None:
        """Return the next event; None at the half-close.

        Between two steps the stream may rest for ever, unless the server drains.
        """
        if self._step is None:
            self._registry.check_accepting()
            seat.resting = True
            event = await anext(self._requests, None)
            seat.resting = False
            return event
        return await transfer.next_or_none(self._requests, self._limits)

    async def _take(self, event: _Event) -> None:
        if isinstance(event, list):
            if self._step:
                self._step.add(event)
                if self._ahead:
                    self._tell_ahead(self._ahead, self._step, event)
            elif not self._refused:
                raise self._out_of_order("chunks")
            return
        match event.WhichOneof("event"):
            case "packed":
                await self._take_packed(event.packed)
            case "shared":
                await self._take_shared(event.shared)
            case "begin":
                await self._begin(event.begin)
            case "end" if self._step:
                await self._end(self._step, event.end.digest)
            case "end" if self._refused:
                pass  # Sent before the client knew.
            case other:
                raise self._out_of_order(other)

    async def _begin(self, begin: pb.StepBegin) -> None:
        self._forget_step(begin.step)
        announced = None
        if not begin.every_parameter:
            announced = decode.tensor_specs(begin.gradients, self._limits, "gradients")
        elif begin.gradients:
            raise InvalidFieldError(
                "every_parameter leaves nothing to announce",
                field="gradients",
                expected="none",
                actual=len(begin.gradients),
            )
        digest = decode.digest(begin.digest, self._limits)
        contribution = self._actor.begin(self._worker, begin.step, announced, digest)
        receiver = None
        if contribution.settled is None:
            targets = self._targets.of(contribution.targets)
            receiver = transfer.Receiver(targets, "gradients[{}]".format, self._limits)
        self._step = OpenStep(contribution, receiver, announces=not begin.every_parameter)
        if self._void and self._void.is_over:
            self._forget_void()
        # Whoever does not read what is void must be able to send all the same.
        ahead = self._overlaps and receiver and begin.every_parameter and not self._void
        if ahead and self._find_room():
            await self._begin_answer(begin.step, self._actor.session.parameters, announces=False)
            write = self._context.write
            gradients = contribution.targets
            self._ahead = Ahead(self._actor, gradients, self._sources, write, self._limits)

    def _find_room(self) -> bool:
        """Reserve what it takes to answer a step ahead of its result, if there is as much."""
        reserved = self._registry.budget.reserved(MEMORY_BYTES, what="overlap", field="step")
        try:
            self._room.enter_context(reserved)
        except MemoryExhaustedError:
            return False
        return True

    def _tell_ahead(self, ahead: Ahead, step: OpenStep, chunks: list[Chunk]) -> None:
        """Say which gradients have grown."""
        specs, encoding = self._actor.spec.parameters, self._actor.spec.wire.gradients
        for position in {chunk.tensor for chunk in chunks}:
            count = step.received(position)
            ahead.received(position, encoded.complete_elements(specs[position], encoding, count))

    async def _end(self, step: OpenStep, digest: bytes) -> None:
        contribution = step.finish(decode.digest(digest, self._limits))
        self._step = None
        self._observer.phase_ended(Phase.RECEIVE, time.perf_counter() - step.started_s)
        self._observer.bytes_moved(Direction.RECEIVED, step.byte_count)
        if self._ahead:
            await self._ahead.finish()
            contribution = self._ahead.completed(contribution)
        outcome, replayed = await self._actor.commit(contribution)
        started_s = time.perf_counter()
        result = pb.TrainResponse(result=encode.step_result(outcome, replayed=replayed))
        ahead = self._ahead if self._ahead and self._ahead.holds else None
        on_the_whole = transfer.on_the_whole(self._byte_count, self._limits)
        if ahead and contribution.preview:
            async with on_the_whole:  # While the step is being made.
                count = await ahead.sent()
                await self._end_answer(result)
        else:
            async with self._actor.reading() as parameters, on_the_whole:
                if ahead:
                    count = await ahead.rest(parameters)
                else:
                    count = await self._answer_anew(outcome.step, parameters, step.announces)
                await self._end_answer(result)
        self._observer.phase_ended(Phase.SEND, time.perf_counter() - started_s)
        self._observer.bytes_moved(Direction.SENT, count)
        # Until then the gradients are needed, and it is not the next step's turn.
        await self._actor.made()

    async def _answer_anew(self, number: int, parameters: Sequence[Tensor], announces: bool) -> int:
        """Send all parameters after the step; return how many bytes they are."""
        self._give_up_answer()
        await self._begin_answer(number, parameters, announces=announces)
        sources = self._sources.whole(parameters)
        return await transfer.send(sources, self._context.write, self._limits)

    async def _end_answer(self, result: pb.TrainResponse) -> None:
        await self._write(result)
        self._sources.delivered()
        if self._ahead:
            self._ahead = None
            self._room.close()

    async def _begin_answer(
        self, number: int, parameters: Sequence[Tensor], *, announces: bool
    ) -> None:
        """Say which parameters follow."""
        self._sources.begin(parameters)
        headers = self._headers if announces else ()
        encoding = self._sources.encoding
        begin = pb.ParametersBegin(step=number, parameters=headers, encoding=encoding)
        await self._write(pb.TrainResponse(begin=begin))

    async def _take_packed(self, packed: pb.PackedStep) -> None:
        """Take a step in one event, and answer it in one."""
        started_s = time.perf_counter()
        self._forget_step(packed.step)
        gradients = self._packed.gradients(packed)
        digest = decode.digest(packed.digest, self._limits)
        contribution = self._actor.begin(self._worker, packed.step, None, digest)
        if contribution.settled is None:
            targets = self._targets.of(contribution.targets)
            for target, data in zip(targets, gradients, strict=True):
                target.write(0, memoryview(data))
        self._observer.phase_ended(Phase.RECEIVE, time.perf_counter() - started_s)
        self._observer.bytes_moved(Direction.RECEIVED, sum(map(len, gradients)))
        outcome, replayed = await self._actor.commit(contribution)
        started_s = time.perf_counter()
        async with self._actor.reading() as parameters:
            sources = self._sources.of(parameters)
            response = pb.PackedParameters(
                result=encode.step_result(outcome, replayed=replayed),
                # copy: parameters to bytes; protobuf copies them once more.
                parameters=[whole(source) for source in sources],
                encoding=self._sources.encoding,
            )
        await self._write(pb.TrainResponse(packed=response))
        self._sources.delivered()
        self._observer.phase_ended(Phase.SEND, time.perf_counter() - started_s)
        self._observer.bytes_moved(Direction.SENT, sum(source.byte_count for source in sources))

    async def _take_shared(self, shared: pb.SharedStep) -> None:
        """Take a step whose gradients are here already, and whose parameters need not travel."""
        self._forget_step(shared.step)
        absent = decode.positions(shared.absent, len(self._headers), "absent")
        digest = decode.digest(shared.digest, self._limits)
        contribution = self._actor.begin_shared(self._worker, shared.step, absent, digest)
        outcome, replayed = await self._actor.commit(contribution)
        result = encode.step_result(outcome, replayed=replayed)
        await self._write(pb.TrainResponse(result=result))

    def _forget_step(self, number: int) -> None:
        """Begin afresh with another step: one that was begun and not ended is given up."""
        self._step, self._number, self._refused = None, number, False
        self._give_up_answer()
        self._registry.check_accepting()

    def _give_up_answer(self) -> None:
        """Send no more of what has become void; _write() waits for what is on its way."""
        if self._ahead:
            self._ahead.give_up()
            self._void, self._ahead = self._ahead, None

    async def _write(self, response: pb.TrainResponse) -> None:
        if self._void:
            await self._void.over()
            self._forget_void()
        await transfer.in_time(self._context.write(response), self._limits)

    def _forget_void(self) -> None:
        self._void = None
        self._room.close()

    async def _refuse(self, error: OptserveError) -> None:
        self._step, self._refused = None, True
        self._give_up_answer()
        self._observer.refused(status.reason_of(error))
        refused = pb.StepRefused(step=self._number, refusal=status.refusal(error))
        await self._write(pb.TrainResponse(refused=refused))

    def _out_of_order(self, event: str | None) -> EventOutOfOrderError:
        return EventOutOfOrderError(
            f"{event or 'nothing'!r} cannot come here",
            field="event",
            expected="chunks or end" if self._step else "begin or packed",
            actual=event or "",
        )
