"""A session in a world of concurrent calls.

One writer at a time, rounds of several workers, work off the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from optserve_server.core.device import Device
from optserve_server.core.errors import (
    InvalidFieldError,
    InvalidNameError,
    RoundTimeoutError,
    SessionDeletedError,
    StepOutOfOrderError,
    UnknownNameError,
    WorkerBusyError,
    draining_error,
)
from optserve_server.core.events import LossEvaluated, Observer, Phase, SessionOpened, StepApplied
from optserve_server.core.lock import SharedLock
from optserve_server.core.losses import LossOutcome
from optserve_server.core.round import Contribution, Round
from optserve_server.core.session import Session, StepOutcome, norm_of
from optserve_server.core.spec import Split
from optserve_server.core.tensors import TensorSpec, check_fits

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a session does not own: where its work runs, what time it is, and who listens."""

    device: Device
    executor: Executor
    clock: Callable[[], float]
    """Seconds since the epoch."""
    observer: Observer


@dataclass(slots=True)
class Attachment:
    """The one call that sends for a worker."""

    task: asyncio.Task[Any]
    resting: bool = False
    """Whether the call waits between two steps, where it can be ended without harm."""


class SessionActor:
    """Serves one session to many calls. Everything is called on the event loop."""

    def __init__(
        self,
        session: Session,
        opened: SessionOpened,
        reserved_bytes: int,
        surroundings: Surroundings,
    ) -> None:
        """Serve ``session``, which nobody else may touch from now on."""
        self.session = session
        self.opened = opened
        self.reserved_bytes = reserved_bytes
        self.created_s = self.used_s = surroundings.clock()
        self.stepped_s: float | None = None
        self.closed = False
        self._surroundings = surroundings
        self._lock = SharedLock()
        self._round = Round(session.spec.workers, step=1)
        self._outcome: StepOutcome | None = None
        self._staging: list[dict[int, Tensor]] = [{} for _ in range(session.spec.workers)]
        self._positions = {parameter.name: i for i, parameter in enumerate(session.spec.parameters)}
        self._attached: dict[int, Attachment] = {}
        self._draining = False
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def session_id(self) -> str:
        """The session's id."""
        return self.opened.session_id

    @property
    def device_name(self) -> str:
        """The device that the session lives on, as torch names it."""
        return str(self._surroundings.device.torch)

    @property
    def idle(self) -> bool:
        """Whether no worker has a call or a stream open."""
        return not self._attached

    @contextmanager
    def attach(self, worker: int) -> Iterator[Attachment]:
        """Be the one call that sends for ``worker``; close() and drain() may end it.

        Raises:
            InvalidFieldError: The session has no such worker.
            WorkerBusyError: Another call sends for it.
        """
        workers = self.session.spec.workers
        if worker >= workers:
            raise InvalidFieldError(
                f"there is no worker {worker}; the session has {workers}, from 0",
                field="worker",
                expected=f"0 to {workers - 1}",
                actual=worker,
            )
        if worker in self._attached:
            raise WorkerBusyError(
                f"another call is sending for worker {worker}", field="worker", actual=worker
            )
        task = asyncio.current_task()
        assert task is not None
        self._attached[worker] = attachment = Attachment(task=task)
        try:
            yield attachment
        except asyncio.CancelledError:  # By us, or by the client's leaving.
            self.check_open()
            if self._draining and attachment.resting:
                raise draining_error() from None
            raise
        finally:
            del self._attached[worker]
            self.used_s = self._surroundings.clock()

    def check_open(self) -> None:
        """Make sure that the session is still there.

        Raises:
            SessionDeletedError: It was deleted.
        """
        if self.closed:
            raise SessionDeletedError(f"session {self.session_id} was deleted")

    def position(self, name: str) -> int | None:
        """Return which parameter has the name; None if none has."""
        return self._positions.get(name)

    def positions_of(self, tensors: Sequence[TensorSpec], field: str) -> list[int]:
        """Return which parameters the announced tensors belong to.

        Args:
            tensors: As they were announced.
            field: Path of the list that they came in.

        Raises:
            CallerError: A name is unknown or stands twice, or a shape or dtype is not the
                parameter's.
        """
        positions = [self._position_of(tensor, f"{field}[{i}]") for i, tensor in enumerate(tensors)]
        if len(set(positions)) != len(positions):
            twice = next(i for i, position in enumerate(positions) if position in positions[:i])
            raise InvalidNameError(
                f"{tensors[twice].name!r} is there twice",
                field=f"{field}[{twice}].name",
                actual=tensors[twice].name,
            )
        return positions

    def begin(self, worker: int, step: int, announced: Sequence[TensorSpec]) -> Contribution:
        """Prepare to receive a worker's gradients for a step.

        Args:
            worker: Attached.
            step: Number of the step.
            announced: The gradients that will come.

        Raises:
            OptserveError: The step, or a gradient, cannot be taken. Nothing was changed.
        """
        self.check_open()
        self.session.check_ready()
        round_ = self._round
        if step not in (round_.step, round_.step - 1) or step == 0:
            raise StepOutOfOrderError(
                f"step {step} is not the next one; the next step is {round_.step}",
                field="step",
                expected=round_.step,
                actual=step,
            )
        positions = self.positions_of(announced, "gradients")
        settled: Round | StepOutcome | None = None
        if step < round_.step:
            settled = self._outcome
        elif round_.has(worker):  # It may be being applied by now: that is not to be done twice.
            settled = round_
        gradients: list[Tensor | None] = [None] * len(self._positions)
        targets = [] if settled else [self._staged(worker, position) for position in positions]
        for position, target in zip(positions, targets, strict=False):
            gradients[position] = target
        return Contribution(
            worker=worker, step=step, gradients=gradients, targets=targets, settled=settled
        )

    async def commit(self, contribution: Contribution) -> tuple[StepOutcome, bool]:
        """Give a received contribution to its round, and wait until the step is applied.

        Returns:
            What the step did, and whether that had been done before.

        Raises:
            OptserveError: The step was refused, or the other workers did not come in time.
        """
        self.check_open()
        if isinstance(contribution.settled, StepOutcome):
            return contribution.settled, True
        round_ = contribution.settled or await self._join_round(contribution)
        try:
            async with asyncio.timeout(self.session.spec.round_timeout_s):
                return await asyncio.shield(round_.done), False
        except TimeoutError:
            raise RoundTimeoutError(
                f"step {contribution.step} waits for workers {round_.missing}; the contribution is"
                " kept: send the same step again to go on waiting",
                field="step",
                expected=f"a contribution of workers {round_.missing}",
                retry_after_s=0.0,
            ) from None

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Sequence[Tensor]]:
        """Hold the parameters' values still, between two steps; see Session.parameters."""
        self.check_open()
        async with self._lock.shared():
            yield self.session.parameters

    async def set_parameters(self, values: Mapping[int, Tensor]) -> None:
        """Set values of parameters, by position, between two steps."""
        await self._exclusive(lambda: self.session.set_parameters(values))

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Session]:
        """Hold the session still, between two steps, for a change that takes no time."""
        self.check_open()
        self.used_s = self._surroundings.clock()
        async with self._lock.exclusive():
            self.check_open()
            yield self.session

    async def evaluate(
        self, split: Split, predictions: Tensor, targets: Tensor, *, with_gradient: bool
    ) -> LossOutcome:
        """Compute the loss, beside whatever else goes on; see Session.evaluate."""
        self.check_open()
        self.used_s = self._surroundings.clock()
        session = self.session
        outcome = await self.run(
            lambda: session.evaluate(predictions, targets, with_gradient=with_gradient)
        )
        session.record(split, outcome, self._surroundings.clock())
        self._surroundings.observer.loss_evaluated(
            LossEvaluated(
                session_id=self.session_id,
                split=split,
                loss=outcome.loss,
                accuracy=outcome.accuracy,
            )
        )
        return outcome

    async def run(self, work: Callable[[], _T]) -> _T:
        """Run ``work`` off the event loop. If the call is cancelled it goes on unseen."""
        return await asyncio.get_running_loop().run_in_executor(self._surroundings.executor, work)

    def drain(self) -> None:
        """End the calls that rest between two steps; the others end by themselves after theirs."""
        self._draining = True
        coming = False
        for worker, attachment in self._attached.items():
            if attachment.resting:
                attachment.task.cancel()
            else:
                coming |= not self._round.has(worker)
        open_ = self._round.missing and not self._round.done.done()
        if open_ and not coming:  # Nobody is left to complete the round.
            self._round.done.set_exception(draining_error())

    async def close(self) -> None:
        """End every call that goes on in the session, and wait until nothing touches it."""
        self.closed = True
        if self._round.missing and not self._round.done.done():
            self._round.done.set_exception(
                SessionDeletedError(f"session {self.session_id} was deleted")
            )
        for attachment in self._attached.values():
            if attachment.task is not asyncio.current_task():
                attachment.task.cancel()
        async with self._lock.exclusive():
            self._staging = []

    def _position_of(self, tensor: TensorSpec, field: str) -> int:
        position = self._positions.get(tensor.name)
        if position is None:
            raise UnknownNameError(
                f"the session has no parameter {tensor.name!r}",
                field=f"{field}.name",
                expected="a parameter of the session",
                actual=tensor.name,
            )
        check_fits(tensor, self.session.spec.parameters[position], field)
        return position

    def _staged(self, worker: int, position: int) -> Tensor:
        """Return the worker's buffer for a gradient.

        Made at its first step, reserved since the session was created.
        """
        staging = self._staging[worker]
        if position not in staging:
            staging[position] = self._surroundings.device.staging(
                self.session.spec.parameters[position]
            )
        return staging[position]

    async def _join_round(self, contribution: Contribution) -> Round:
        """Add a contribution to the open round; start the step if it was the last one missing."""
        session, gradients = self.session, contribution.gradients
        if (
            session.spec.workers > 1
        ):  # A bad gradient is the mistake of the worker that brings it, and of no other.
            await self.run(lambda: session.check_finite(gradients, norm_of(gradients)))
            self.check_open()
        round_ = self._round
        round_.add(contribution.worker, gradients)
        if not round_.missing:
            self._spawn(self._apply(round_))
        return round_

    async def _apply(self, round_: Round) -> None:
        """Apply a complete round, and tell everybody who waits for it.

        Belongs to no call: none can cancel it.
        """
        observer = self._surroundings.observer
        async with self._lock.exclusive():
            started = time.perf_counter()
            for arrival in round_.arrivals:
                observer.phase_ended(Phase.QUEUE, started - arrival)
            try:
                self.check_open()
                outcome = await self.run(
                    lambda: self.session.step(round_.mean(self._surroundings.device))
                )
            except Exception as error:  # noqa: BLE001 - Whatever it is belongs to those who wait.
                self._round = Round(self.session.spec.workers, step=round_.step)
                round_.done.set_exception(error)
                return
            observer.phase_ended(Phase.APPLY, time.perf_counter() - started)
        self._outcome = outcome
        self._round = Round(self.session.spec.workers, step=round_.step + 1)
        self.stepped_s = self.used_s = self._surroundings.clock()
        round_.done.set_result(outcome)
        observer.step_applied(
            StepApplied(
                session_id=self.session_id,
                optimizer=self.session.spec.optimizer.kind,
                step=outcome.step,
                rates=outcome.rates,
                gradient_norm=outcome.gradient_norm,
                time_s=self.stepped_s,
            )
        )

    async def _exclusive(self, work: Callable[[], _T]) -> _T:
        """Run ``work`` alone, to its end even if the call that asked for it is cancelled."""
        self.check_open()
        self.used_s = self._surroundings.clock()

        async def locked() -> _T:
            async with self._lock.exclusive():
                self.check_open()
                return await self.run(work)

        return await asyncio.shield(self._spawn(locked()))

    def _spawn(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # asyncio itself keeps only a weak reference.
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # Looked at, or asyncio complains when the call that waited has gone.
