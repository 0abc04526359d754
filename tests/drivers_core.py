"""The core in this process, without gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

from drivers import Evaluation, StepAnswer, Tensors
from event_loop import EventLoopThread
from messages import messages_of
from refusals import RefusedError, translated
from torch import Tensor

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.session_pb2 import Session, SessionSpec, SessionStatus, Split
from optserve_server.core.actor import SessionActor
from optserve_server.core.device import Device
from optserve_server.core.errors import OptserveError
from optserve_server.core.evaluation import evaluate
from optserve_server.core.events import NullObserver
from optserve_server.core.limits import Limits
from optserve_server.core.persistence import Persistence
from optserve_server.core.registry import SessionRegistry
from optserve_server.core.surroundings import Overlap, Surroundings
from optserve_server.core.tenant import DEFAULT_TENANT, TenantRegistry
from optserve_server.core.tensors import spec_of
from optserve_server.rpc import change, create, decode, encode

_T = TypeVar("_T")


@contextmanager
def registry_on(
    loop: EventLoopThread,
    limits: Limits,
    overlap: Overlap = Overlap.AUTO,
    persistence: Persistence | None = None,
    device: Device | None = None,
) -> Iterator[SessionRegistry]:
    """Make a registry of sessions whose events happen on ``loop``."""
    with ThreadPoolExecutor(4) as executor:
        surroundings = Surroundings(
            device=device or Device("cpu"),
            executor=executor,
            clock=time.time,
            observer=NullObserver(),
            overlap=overlap,
            persistence=persistence,
        )
        yield loop.call(lambda: SessionRegistry(limits, surroundings))


class CoreDriver:
    """Calls the core as the servicer does, with the contract's messages at its edge only."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.loop = self._stack.enter_context(EventLoopThread())
        registry = self._stack.enter_context(registry_on(self.loop, self._limits))
        self.registry = registry.of(DEFAULT_TENANT)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def create(
        self, spec: SessionSpec, values: Tensors | None = None, request_id: str = ""
    ) -> Session:
        request = pb.CreateSessionRequest(
            spec=spec, values=messages_of(values or {}), request_id=request_id
        )

        async def created() -> Session:
            return encode.session(await create.create(request, self.registry))

        return self._run(created())

    def get(self, session_id: str) -> Session:
        async def got() -> Session:
            return encode.session(await self.registry.find(session_id))

        return self._run(got())

    def sessions(self, page_size: int = 0, page_token: str = "") -> pb.ListSessionsResponse:
        after, count = decode.page(page_size, page_token, 100)
        actors, next_after = self._run(self.registry.page(after=after, count=count))
        return pb.ListSessionsResponse(
            sessions=[encode.session_status(actor) for actor in actors],
            next_page_token="" if next_after is None else str(next_after),
        )

    def update(self, request: pb.UpdateSessionRequest) -> Session:
        async def updated() -> Session:
            return encode.session(await change.update(request, self.registry))

        return self._run(updated())

    def delete(self, session_id: str) -> SessionStatus:
        return encode.session_status(self._run(self.registry.delete(session_id)))

    def upload(self, session_id: str, values: Tensors) -> SessionStatus:
        async def uploaded() -> SessionStatus:
            actor = await self.registry.find(session_id)
            await _set(actor, values)
            return encode.session_status(actor)

        return self._run(uploaded())

    def download(self, session_id: str, names: Sequence[str] = ()) -> dict[str, Tensor]:
        async def downloaded() -> dict[str, Tensor]:
            actor = await self.registry.find(session_id)
            actor.session.check_ready()
            values = await _parameters(actor)
            return {name: values[name] for name in names} if names else values

        return self._run(downloaded())

    @contextmanager
    def worker(
        self, session_id: str, worker: int = 0, client_id: bytes = b""
    ) -> Iterator[_CoreWorker]:
        stream = _CoreWorker(worker, client_id)
        serving = self.loop.start(stream.serve(self.registry, session_id))
        try:
            with translated():
                stream.opened.result()
            yield stream
        finally:
            self.loop.call(stream.leave)
            wait([serving])

    def contribution(self, session_id: str, worker: int = 0) -> pb.GetContributionResponse:
        async def asked() -> pb.GetContributionResponse:
            return _contribution(await self.registry.find(session_id), worker)

        return self._run(asked())

    def end_epoch(self, session_id: str, epoch: int) -> SessionStatus:
        async def ended() -> SessionStatus:
            actor = await self.registry.find(session_id)
            async with actor.writing() as session:
                await actor.make(lambda: session.end_epoch(epoch))
            return encode.session_status(actor)

        return self._run(ended())

    def evaluate(
        self,
        session_id: str,
        predictions: Tensor,
        targets: Tensor,
        *,
        split: Split.ValueType = Split.SPLIT_UNSPECIFIED,
        gradient: bool = False,
    ) -> Evaluation:
        async def evaluated() -> Evaluation:
            actor = await self.registry.find(session_id)
            outcome = await evaluate(
                actor, decode.split(split), predictions, targets, with_gradient=gradient
            )
            return Evaluation(
                result=encode.loss_result(outcome, actor.session.steps),
                gradient=outcome.gradient,
                elements=outcome.elements,
            )

        return self._run(evaluated())

    def loss_points(self, request: pb.ListLossPointsRequest) -> pb.ListLossPointsResponse:
        after, count = decode.page(request.page_size, request.page_token, 10_000)
        history = self._run(self.registry.find(request.session_id)).session.history
        page = history.page(decode.split(request.split), after=after, count=count)
        return pb.ListLossPointsResponse(
            points=[encode.loss_point(point) for point in page.points],
            forgotten=page.forgotten,
            next_page_token=str(page.points[-1].sequence) if page.more else "",
        )

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        with translated():
            return self.loop.run(work)

    def _call(self, function: Callable[[], _T]) -> _T:
        with translated():
            return self.loop.call(function)


class _CoreWorker:
    """One worker's steps, one after the other, in a task that is attached to the session."""

    status: SessionStatus
    contribution: pb.Contribution | None

    def __init__(self, worker: int, client_id: bytes) -> None:
        self.opened: Future[None] = Future()
        self._worker, self._client_id = worker, client_id
        self._steps: asyncio.Queue[_Step | None]
        self._unanswered: list[Future[StepAnswer]] = []
        self._end: OptserveError | None = None
        self._task: asyncio.Task[Any]
        self._loop: asyncio.AbstractEventLoop

    async def serve(self, registry: TenantRegistry, session_id: str) -> None:
        """Take steps until the worker leaves."""
        self._loop, self._steps = asyncio.get_running_loop(), asyncio.Queue()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        try:
            actor = await registry.find(session_id)
            await actor.vacate(self._worker, self._client_id)
            with actor.attach(self._worker, self._client_id):
                self.status = encode.session_status(actor)
                last = actor.last_contribution(self._worker)
                self.contribution = encode.contribution(last) if last else None
                self.opened.set_result(None)
                while (step := await self._steps.get()) is not None:
                    await _answer(actor, self._worker, step)
        except OptserveError as error:
            self._end = error
            if not self.opened.done():
                self.opened.set_exception(error)
            for answer in self._unanswered:
                if not answer.done():
                    answer.set_exception(RefusedError.from_error(error))

    def start(self, step: int, gradients: Tensors, digest: bytes = b"") -> Future[StepAnswer]:
        sent = _Step(number=step, gradients=gradients, digest=digest)
        self._loop.call_soon_threadsafe(self._send, sent)
        return sent.answer

    def abandon(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)

    def leave(self) -> None:
        """End the stream once the steps that were sent have been answered."""
        self._steps.put_nowait(None)

    def _send(self, step: _Step) -> None:
        if self._end:
            step.answer.set_exception(RefusedError.from_error(self._end))
            return
        self._unanswered.append(step.answer)
        self._steps.put_nowait(step)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A step that was sent."""

    number: int
    gradients: Tensors
    digest: bytes
    answer: Future[StepAnswer] = field(default_factory=Future)


async def _answer(actor: SessionActor, worker: int, step: _Step) -> None:
    try:
        specs = [spec_of(name, gradient) for name, gradient in step.gradients.items()]
        whole = specs == list(actor.spec.parameters)  # Then nobody need look for their places.
        contribution = actor.begin(worker, step.number, None if whole else specs, step.digest)
        for target, gradient in zip(contribution.targets, step.gradients.values(), strict=False):
            target.copy_(gradient)
        outcome, replayed = await actor.commit(contribution)
        result = encode.step_result(outcome, replayed=replayed)
        step.answer.set_result(StepAnswer(result=result, parameters=await _parameters(actor)))
    except OptserveError as error:
        step.answer.set_exception(RefusedError.from_error(error))


def _contribution(actor: SessionActor, worker: int) -> pb.GetContributionResponse:
    return encode.contribution_response(actor, actor.last_contribution(worker))


async def _set(actor: SessionActor, values: Tensors) -> None:
    specs = [spec_of(name, value) for name, value in values.items()]
    positions = actor.positions.of(specs, "parameters")
    await actor.set_parameters(dict(zip(positions, values.values(), strict=True)))


async def _parameters(actor: SessionActor) -> dict[str, Tensor]:
    async with actor.reading() as parameters:
        named = zip(actor.session.spec.parameters, parameters, strict=True)
        return {spec.name: parameter.clone() for spec, parameter in named}
