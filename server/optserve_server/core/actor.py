"""A session in a world of concurrent calls: who may touch it, when, and what they see."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from torch import Tensor

from optserve_server.core.admission import Spare
from optserve_server.core.catalogue import catalogue_facts
from optserve_server.core.creations import CreationRequest
from optserve_server.core.durability import Archive
from optserve_server.core.errors import (
    EventOutOfOrderError,
    SessionDeletedError,
    draining_error,
)
from optserve_server.core.events import SessionOpened, StepApplied
from optserve_server.core.outcome import StepOutcome
from optserve_server.core.positions import Positions
from optserve_server.core.preview import Preview
from optserve_server.core.quotas import TenantBudget
from optserve_server.core.region import SharedMemory
from optserve_server.core.round import Contribution, LastContribution
from optserve_server.core.rounds import Rounds
from optserve_server.core.seats import Seat, Seats, current_task
from optserve_server.core.session import Session
from optserve_server.core.spec import SessionSpec
from optserve_server.core.standing import Standing, live_standing
from optserve_server.core.storage import Json
from optserve_server.core.surroundings import Surroundings
from optserve_server.core.tensors import TensorSpec
from optserve_server.core.work import Work, to_its_end


class SessionActor:
    """Serves one session to many calls. Everything is called on the event loop."""

    def __init__(
        self,
        session: Session,
        opened: SessionOpened,
        reserved_bytes: int,
        budget: TenantBudget,
        surroundings: Surroundings,
    ) -> None:
        """Serve ``session``, which nobody else may touch from now on."""
        self.opened = opened
        self.budget = budget
        self.reserved_bytes = reserved_bytes
        self.view = session.view()
        """Where the session stands: never half of a step."""
        self.created_s = surroundings.clock()
        self.stepped_s: float | None = None
        self.closed = False
        self.work = Work(surroundings.executor)
        self.session = session
        self.surroundings = surroundings
        self._used_s = surroundings.monotonic()
        self.archive: Archive | None = None
        """What keeps the session on disk. None: nothing does."""
        self._rounds = Rounds(
            session,
            self.work,
            surroundings.device,
            observer=surroundings.observer,
            monotonic=surroundings.monotonic,
            session_id=opened.session_id,
            publish=self._publish,
            stepped=self._stepped,
            check_open=self.check_open,
        )
        self.positions = Positions(session.spec.parameters)
        self._seats = Seats(session.spec.workers)
        self._shared: dict[int, SharedMemory] = {}
        self._uses = 0
        self.spare = Spare()
        """The room of the gradients; idle until every parameter has a value."""
        self._readers: set[asyncio.Task[Any]] = set()
        self.request: CreationRequest | None = None
        """What has made the session, to be kept with it."""
        self._draining = False

    @property
    def session_id(self) -> str:
        """The session's id."""
        return self.opened.session_id

    @property
    def spec(self) -> SessionSpec:
        """What is in force."""
        return self.session.spec

    def keep(self, archive: Archive) -> None:
        """Have the session kept on disk from now on."""
        self.archive = self._rounds.archive = archive

    def standing(self) -> Standing:
        """Return where the session stands."""
        return live_standing(
            self.spec,
            self.view,
            session_id=self.session_id,
            reserved_bytes=self.reserved_bytes,
            device=str(self.surroundings.device.torch),
            created_s=self.created_s,
            stepped_s=self.stepped_s,
            durable_steps=self.archive.durable_steps(self.view.steps) if self.archive else 0,
        )

    def about(self) -> Mapping[str, Json]:
        """Return what a snapshot says beside the session's state."""
        return {"stepped_s": self.stepped_s}

    def facts(self) -> Mapping[str, Json]:
        """Return what the catalogue says of the session."""
        return catalogue_facts(self.opened.tenant, self.request, self.standing())

    @property
    def may_be_parked(self) -> bool:
        """Whether nothing would be lost with the memory: no contribution waits, and no change."""
        return self.archive is not None and self.work.lock.is_free and not self._rounds.is_open

    def idle_s(self) -> float:
        """Return for how long nobody has used the session; 0 while a transfer or stream goes on."""
        if self._uses or self._readers or any(self._seats):
            return 0.0
        return self.surroundings.monotonic() - self._used_s

    def check_open(self) -> None:
        """Make sure that the session is still there.

        Raises:
            SessionDeletedError: It was deleted.
        """
        if self.closed:
            raise self._deleted()

    async def vacate(self, worker: int, client_id: bytes) -> None:
        """End the stream that a client has left open for a worker; see Seats.vacate.

        What the worker has contributed stays. While the server drains nothing is ended.
        """
        if not self._draining:
            await self._seats.vacate(worker, client_id)

    @contextmanager
    def attach(self, worker: int, client_id: bytes = b"") -> Iterator[Seat]:
        """Be the one call that sends for ``worker``; close(), drain() and vacate() may end it.

        Raises:
            InvalidFieldError: The session has no such worker.
            WorkerBusyError: Another call sends for it.
        """
        self.check_open()
        seat = self._seats.take(worker, client_id)
        try:
            yield seat
        except asyncio.CancelledError:  # By us, or by the client's leaving.
            self.check_open()
            seat.check_held()
            if self._draining and seat.resting:
                raise draining_error() from None
            raise
        finally:
            self._seats.leave(seat)
            if worker not in self._shared and not self.closed:
                self._rounds.release(worker)
            self.touch()
            if self._draining:
                self._abandon_hopeless_round()

    async def share(self, worker: int) -> SharedMemory:
        """Let an attached worker map the parameters and its gradients; always the same regions.

        Raises:
            RegionUnavailableError: There is no memory to share. Nothing was changed.
        """
        if worker not in self._shared:

            def share() -> SharedMemory:
                parameters = self.session.share()
                return SharedMemory(parameters=parameters, gradients=self._rounds.share(worker))

            self._shared[worker] = await self.work.run_alone(share, self.check_open)
        return self._shared[worker]

    def last_contribution(self, worker: int) -> LastContribution | None:
        """Return the last step that a worker has contributed to; None if there is none.

        Raises:
            InvalidFieldError: The session has no such worker.
        """
        self._seats.check_worker(worker)
        return self._rounds.last_contribution(worker)

    def begin(
        self,
        worker: int,
        step: int,
        announced: Sequence[TensorSpec] | None,
        digest: bytes = b"",
    ) -> Contribution:
        """Prepare to receive the gradients of an attached worker; see Rounds.begin.

        Args:
            worker: Who sends.
            step: Number of the step.
            announced: What will come. None: a gradient for every parameter, in their order.
            digest: What identifies the content, if it is known already.
        """
        self.check_open()
        positions = None if announced is None else self.positions.of(announced, "gradients")
        return self._rounds.begin(worker, step, positions, digest)

    def begin_shared(
        self, worker: int, step: int, absent: Sequence[int], digest: bytes = b""
    ) -> Contribution:
        """Prepare to take the gradients of an attached worker from where they are shared.

        Args:
            worker: Who has written them.
            step: Number of the step.
            absent: Positions of the parameters that have no gradient.
            digest: What identifies the content, if anything does.

        Raises:
            EventOutOfOrderError: Nothing is shared with the worker.
            OptserveError: As of Rounds.begin.
        """
        self.check_open()
        if worker not in self._shared:
            raise EventOutOfOrderError(
                f"worker {worker} shares no memory with the server", field="event"
            )
        missing = set(absent)
        present = [each for each in range(len(self.spec.parameters)) if each not in missing]
        return self._rounds.begin(worker, step, present if missing else None, digest)

    async def preview(self, preview: Preview, work: Callable[[], None]) -> bool:
        """Run ``work``, which computes with a preview, in a thread, while the session stays still.

        Returns:
            Whether it was done: not if the session has changed since the preview was made.
        """
        async with self.work.lock.shared():
            self.check_open()
            if preview.is_void:
                return False
            await self.work.run(work)
            return True

    async def commit(self, contribution: Contribution) -> tuple[StepOutcome, bool]:
        """Contribute what was received, and wait for the step; see Rounds.commit.

        Who wants to know what has become of the session must wait for made(), or read it.
        """
        self.check_open()
        answer = await self._rounds.commit(contribution)
        if contribution.settled is not None:
            self.surroundings.observer.step_repeated(self.spec.optimizer.kind)
        return answer

    async def made(self) -> None:
        """Wait until the session is what somebody may have been told of it; see Rounds.made."""
        await self._rounds.made()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Sequence[Tensor]]:
        """Hold the parameters' values still, between two steps; see Session.parameters."""
        self.check_open()
        self.touch()
        task = current_task()
        self._readers.add(task)
        try:
            async with self.work.lock.shared():
                self.check_open()
                yield self.session.parameters
        except asyncio.CancelledError:  # By close(), or by the client's leaving.
            self.check_open()
            raise
        finally:
            self._readers.discard(task)
            self.touch()

    async def set_parameters(self, values: Mapping[int, Tensor]) -> None:
        """Set values of parameters, by position, between two steps."""
        self.touch()
        await to_its_end(self.work.spawn(self._set_parameters(values)))

    async def _set_parameters(self, values: Mapping[int, Tensor]) -> None:
        async with self.writing() as session:
            if self.archive and self.archive.journals:
                await self.archive.make(lambda: session.set_parameters(values))
            else:
                await self.work.run(lambda: session.set_parameters(values))
        if self.archive:
            self.archive.changed(at_once=not self.archive.journals)

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Session]:
        """Hold the session still, between two steps, to change it: see make()."""
        self.touch()
        async with self.work.lock.exclusive():
            self.check_open()
            try:
                yield self.session
            finally:
                self._publish()

    async def make(self, change: Callable[[], object]) -> None:
        """Make a change that takes no time to the session, which is held; return once it is kept.

        Raises:
            OptserveError: As of ``change``, or of Archive.make.
        """
        if self.archive and self.archive.journals:
            await self.archive.make(change)
        else:
            change()

    @property
    def awaits_values(self) -> bool:
        """Whether no gradient can come yet, and none has a place already."""
        return not (self.view.ready or self._shared)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Note that the session is in use for as long as a block takes."""
        self._uses += 1
        try:
            yield
        finally:
            self._uses -= 1
            self.touch()

    def touch(self) -> None:
        """Note that the session is in use."""
        self._used_s = self.surroundings.monotonic()

    def drain(self) -> None:
        """End the calls that rest between two steps; the others end by themselves after theirs."""
        self._draining = True
        for seat in self._seats:
            if seat.resting:
                seat.task.cancel()
        self._abandon_hopeless_round()

    async def close(self) -> None:
        """End every call that goes on in the session, and wait until nothing touches it."""
        self.closed = True
        self._rounds.abandon(self._deleted())
        for task in {seat.task for seat in self._seats} | self._readers:
            task.cancel()
        await to_its_end(self.work.spawn(self._forget()))

    async def _forget(self) -> None:
        async with self.work.lock.exclusive():
            # At once, and not when Python next looks for cycles: the memory is others' from now on.
            self._rounds.forget()
            self.session.forget()
            for shared in self._shared.values():  # Nobody can attach any more; who has, keeps it.
                shared.gradients.close()
                shared.parameters.close()
            self._shared.clear()

    def _stepped(self, outcome: StepOutcome) -> None:
        self.touch()
        coming = {seat.worker for seat in self._seats} | self._shared.keys()
        for worker in set(range(self.spec.workers)) - coming:
            self._rounds.release(worker)  # It left while the step was made of its gradients.
        self.stepped_s = self.surroundings.clock()
        self.surroundings.observer.step_applied(
            StepApplied(
                session_id=self.session_id,
                optimizer=self.spec.optimizer.kind,
                step=outcome.step,
                rates=outcome.rates,
                gradient_norm=outcome.gradient_norm,
                time_s=self.stepped_s,
            )
        )

    def _publish(self) -> None:
        """Show where the session stands now, between two steps."""
        self.view = self.session.view()
        if self.archive:
            self.archive.changed()

    def _abandon_hopeless_round(self) -> None:
        """While draining, let those go who wait for a worker that will not come any more."""
        coming = any(not seat.resting and not self._rounds.has(seat.worker) for seat in self._seats)
        if not coming:
            self._rounds.abandon(draining_error())

    def _deleted(self) -> SessionDeletedError:
        return SessionDeletedError(f"session {self.session_id} was deleted")
