"""The rounds of a session: gradients come in, and when all are there, the step is made."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from torch import Tensor

from optserve_server.core.admission import keeps_private_gradients
from optserve_server.core.device import Device
from optserve_server.core.durability import Archive
from optserve_server.core.errors import (
    OptserveError,
    RoundTimeoutError,
    SessionFailedError,
    StepOutOfOrderError,
)
from optserve_server.core.events import Observer, Phase
from optserve_server.core.norms import check_finite, norm_of
from optserve_server.core.outcome import StepOutcome
from optserve_server.core.region import Region, RegionUnavailableError, private
from optserve_server.core.round import Contribution, LastContribution, Round
from optserve_server.core.session import Session
from optserve_server.core.spec import SessionSpec
from optserve_server.core.staging import Staging
from optserve_server.core.work import Work

_LOGGER = logging.getLogger(__name__)

# Adam on so much takes 0.1 ms on one core, half of it for any size at all.
_SMALL_TENSORS_MAX = 16
_SMALL_ELEMENTS_MAX = 1 << 16


class Rounds:
    """One round after the other."""

    def __init__(
        self,
        session: Session,
        work: Work,
        device: Device,
        *,
        observer: Observer,
        monotonic: Callable[[], float],
        session_id: str,
        publish: Callable[[], None],
        stepped: Callable[[StepOutcome], None],
        check_open: Callable[[], None],
    ) -> None:
        """Begin with the session's next step.

        Args:
            session: Whose steps these are.
            work: Where they are made.
            device: Where the gradients go.
            observer: Told how long the phases took.
            monotonic: Seconds, from any beginning.
            session_id: The session's, for the log.
            publish: Called when the session may stand elsewhere, before anybody else holds it.
            stepped: Called after each step.
            check_open: Called before each step; raises if the session is gone.
        """
        self._session = session
        self._steps_are_small = _steps_are_small(session.spec, device)
        self._work = work
        self._device = device
        self._observer = observer
        self._monotonic = monotonic
        self._session_id = session_id
        self._publish = publish
        self._stepped = stepped
        self._check_open = check_open
        self.archive: Archive | None = None
        """What keeps the session on disk. None: nothing does."""
        self._round = Round(session.spec.workers, session.steps + 1)
        self._outcome = session.last_outcome
        self._staging = [self._staging_of() for _ in range(session.spec.workers)]
        # In a session with a journal, once a client shares its gradients, which it could change
        # between the journal and the step: both are of what lies here.
        self._private: Sequence[Tensor] = ()

    def share(self, worker: int) -> Region:
        """Make a worker's buffers memory that it may write to itself; once, and for good.

        The new ones take the old ones' place: there is no more memory to it than was reserved.

        Raises:
            RegionUnavailableError: There is no such memory, or the old buffers are still needed.
        """
        if self._round.has(worker):
            raise RegionUnavailableError("the open round holds the worker's gradients")
        self.release(worker)
        spec = self._session.spec
        region = Region(spec.parameters, read_only=False)
        if not self._private and keeps_private_gradients(spec, self._device.torch):
            self._private = private(spec.parameters)
        self._staging[worker] = self._staging_of(region.tensors)
        return region

    def release(self, worker: int) -> None:
        """Let the memory of a worker's gradients go while it has no call, unless it is needed."""
        if not self._round.has(worker):
            self._staging[worker] = self._staging_of()

    @property
    def is_open(self) -> bool:
        """Whether a worker has contributed to a step that waits for others."""
        return len(self._round.missing) < self._session.spec.workers

    def has(self, worker: int) -> bool:
        """Return whether the worker has contributed to the open round."""
        return self._round.has(worker)

    def last_contribution(self, worker: int) -> LastContribution | None:
        """Return the last step that a worker has contributed to; None if there is none.

        Raises:
            SessionFailedError: The session has failed: what is left of its last step is unknown.
        """
        if self._session.failed:
            raise SessionFailedError(
                "the session has failed, and what is left of its last step is unknown; if it is"
                " durable, a restart of the server says"
            )
        round_, outcome = self._round, self._outcome
        if round_.has(worker):
            return LastContribution(step=round_.step, digest=round_.digests[worker], outcome=None)
        if outcome is None:
            return None
        # Every worker has contributed to it, or there had been no step.
        return LastContribution(step=outcome.step, digest=outcome.digests[worker], outcome=outcome)

    def begin(
        self, worker: int, step: int, positions: Sequence[int] | None, digest: bytes = b""
    ) -> Contribution:
        """Prepare to receive a worker's gradients for a step.

        Args:
            worker: Who sends; only one call at a time for each.
            step: Number of the step.
            positions: Which parameters' gradients will come. None: those of all, in their order.
            digest: What identifies their content. Empty: nothing does, or it is not known yet.

        Raises:
            StepConflictError: The worker has contributed other content to the step.
            OptserveError: The step cannot be taken. Nothing was changed.
        """
        self._session.check_ready()
        round_ = self._round
        if step not in (round_.step, round_.step - 1) or step == 0:
            raise self._out_of_order(step)
        settled: Round | StepOutcome | None = None
        if step < round_.step:
            settled = self._outcome
        elif round_.has(worker):  # It may be being applied by now: that is not to be done twice.
            settled = round_
        gradients: Sequence[Tensor | None] = ()
        targets: Sequence[Tensor] = ()
        staging = self._staging[worker]
        if settled is None and positions is None:
            gradients = targets = staging.all()
        elif settled is None and positions is not None:
            staged = {each: staging.at(each) for each in positions}
            gradients = [staged.get(each) for each in range(len(self._session.parameters))]
            targets = list(staged.values())
        contribution = Contribution(
            worker=worker,
            step=step,
            digest=digest,
            gradients=gradients,
            targets=targets,
            loading=staging.loading(positions) if settled is None else None,
            settled=settled,
        )
        contribution.check_digest()
        return contribution

    async def commit(self, contribution: Contribution) -> tuple[StepOutcome, bool]:
        """Give a received contribution to its round, and wait until the step is applied.

        If a preview has computed all of it, and it comes true, only until that is decided: whoever
        looks at the session has to wait for made().

        Returns:
            What the step did, and whether that had been done before.

        Raises:
            StepConflictError: The worker has contributed other content to the step.
            OptserveError: The step was refused, or the other workers did not come in time.
        """
        contribution.check_digest()  # It may have come with the last gradient only.
        if isinstance(contribution.settled, StepOutcome):
            if contribution.settled is not self._outcome:  # The parameters are of a later step now.
                raise self._out_of_order(contribution.step)
            return contribution.settled, True
        round_ = contribution.settled or await self._join(contribution)
        if round_.done.done():
            return round_.done.result(), False
        try:
            async with asyncio.timeout(self._session.spec.round_timeout_s):
                await asyncio.shield(round_.closed)
        except TimeoutError:
            raise RoundTimeoutError(
                f"step {contribution.step} waits for workers {round_.missing}; the contribution is"
                " kept: send the same step again to go on waiting",
                field="step",
                expected=f"a contribution of workers {round_.missing}",
                retry_after_s=0.0,
            ) from None
        # Whoever has no preview of the step needs the session.
        certain = round_.decided if contribution.preview else round_.done
        return await asyncio.shield(certain), False

    async def made(self) -> None:
        """Wait until a step that was decided has been made, or has failed."""
        round_ = self._round
        if round_.decided.done():
            await asyncio.wait([round_.done])

    def abandon(self, error: OptserveError) -> None:
        """Give up the round, unless all have contributed to it."""
        self._round.abandon(error)

    def forget(self) -> None:
        """Let the gradients' memory go; there will be no more steps."""
        self._staging, self._private = [], ()
        self._round = Round(self._session.spec.workers, self._round.step)

    async def _join(self, contribution: Contribution) -> Round:
        """Add a contribution to the open round; start the step if it was the last one missing."""
        session, gradients = self._session, contribution.gradients
        if session.spec.workers > 1:
            # A bad gradient is the mistake of the worker that brings it, and of no other.
            await self._work.run(lambda: check_finite(session.spec, gradients, norm_of(gradients)))
            self._check_open()
        round_ = self._round
        if round_.done.done():  # It was abandoned meanwhile; waiting for it will say why.
            return round_
        round_.add(contribution, self._monotonic())
        if round_.missing:
            return round_
        at_once = self.archive is None or self.archive.takes_steps_at_once
        if self._steps_are_small and at_once and self._work.lock.is_free:
            # The way to a thread and back would cost more than the step. Nobody can come between.
            with self._settling(round_):
                session.step(round_.mean(), round_.digests, round_.norm)
        else:
            self._work.spawn(self._apply(round_))
        return round_

    async def _apply(self, round_: Round) -> None:
        """Apply a complete round in a thread."""
        archive = self.archive
        refusal = await self._admission() if archive else None
        journals = archive is not None and archive.journals
        shared = self._session.is_shared
        loop = asyncio.get_running_loop()

        def decided(outcome: StepOutcome) -> None:
            # The answer is complete if a preview came true. But what a journal is to keep is told
            # once it does, and a client with shared memory looks at the session without asking.
            if round_.preview and round_.preview.came_true and not journals and not shared:
                loop.call_soon_threadsafe(round_.decide, outcome)

        def step() -> None:
            gradients = round_.mean(into=self._private)
            with round_.preview.beside_others() if round_.preview else nullcontext():
                self._session.step(gradients, round_.digests, round_.norm, decided)

        async with self._work.lock.exclusive():
            with self._settling(round_):
                self._check_open()
                if refusal:
                    raise refusal
                if archive and journals:
                    await archive.make(step)
                else:
                    await self._work.run(step)

    async def _admission(self) -> OptserveError | None:
        """Wait until the session may step; return why it may not."""
        assert self.archive is not None
        try:
            await self.archive.admit()
        except OptserveError as error:
            return error
        return None

    @contextmanager
    def _settling(self, round_: Round) -> Iterator[None]:
        """After a block that steps, open the next round, and tell those who wait what came of it.

        The block has the session to itself. What it raises belongs to those who wait.
        """
        session, error = self._session, None
        started_s = self._monotonic()
        for arrival_s in round_.arrivals_s:
            self._observer.phase_ended(Phase.QUEUE, started_s - arrival_s)
        try:
            yield
        except Exception as caught:  # noqa: BLE001 - Of whatever kind.
            error = caught
        self._outcome = outcome = session.last_outcome
        self._round = Round(session.spec.workers, session.steps + 1)
        self._publish()
        if error is not None and round_.decided.done():  # No call is left to say so.
            about = {"session": self._session_id, "step": round_.step}
            _LOGGER.error("a step has failed half way", extra=about, exc_info=error)
        if error is not None or outcome is None:
            round_.refuse(error or AssertionError("a step has an outcome"))
            return
        self._observer.phase_ended(Phase.APPLY, self._monotonic() - started_s)
        round_.settle(outcome)
        self._stepped(outcome)

    def _out_of_order(self, step: int) -> StepOutOfOrderError:
        return StepOutOfOrderError(
            f"step {step} is not the next one; the next step is {self._round.step}",
            field="step",
            expected=self._round.step,
            actual=step,
        )

    def _staging_of(self, shared: Sequence[Tensor] = ()) -> Staging:
        """Return memory for a worker's gradients, which takes none before it is needed."""
        return Staging(self._session.spec.parameters, self._device, shared)


def _steps_are_small(spec: SessionSpec, device: Device) -> bool:
    """Return whether a step takes less time than the way to another thread and back: some 0.1 ms.

    With all that the workers bring: their mean is part of it.
    """
    tensors, elements = len(spec.parameters), sum(each.element_count for each in spec.parameters)
    return (
        not device.is_cuda
        and spec.workers * tensors <= _SMALL_TENSORS_MAX
        and spec.workers * elements <= _SMALL_ELEMENTS_MAX
    )
