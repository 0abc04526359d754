"""All sessions of a server: who may be created, who is there, who is gone."""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from optserve_server.core.actor import SessionActor
from optserve_server.core.admission import Budget
from optserve_server.core.beginning import Beginning
from optserve_server.core.catalogue import ParkedSession
from optserve_server.core.checkpoints import Checkpoints
from optserve_server.core.creations import CreationRequest, Creations
from optserve_server.core.errors import (
    SessionFailedError,
    SessionNotFoundError,
    TooManyError,
    draining_error,
)
from optserve_server.core.events import SessionOpened
from optserve_server.core.limits import Limits
from optserve_server.core.quotas import Quotas
from optserve_server.core.recovery import OutgrownError
from optserve_server.core.session import Session
from optserve_server.core.shelf import Shelf, no_storage_error
from optserve_server.core.spec import DurabilityMode
from optserve_server.core.standing import Listed
from optserve_server.core.surroundings import Surroundings
from optserve_server.core.tenant import TenantRegistry
from optserve_server.core.work import to_its_end

_T = TypeVar("_T")

_ID_BYTES = 16  # 128 random bits: not to be guessed.
_RETRY_AFTER_S = 5.0


class SessionRegistry:
    """Creates, finds and forgets sessions. Everything is called on the event loop."""

    def __init__(self, limits: Limits, surroundings: Surroundings) -> None:
        """Start without sessions."""
        self.limits = limits
        self.surroundings = surroundings
        self.budget = Budget(limits, surroundings.observer)
        self.quotas = Quotas(limits, self.budget)
        self.creations = Creations()
        self._draining = False
        self._actors: dict[str, SessionActor] = {}
        self._shelf = (
            Shelf(surroundings.persistence, surroundings, self.quotas, limits)
            if surroundings.persistence
            else None
        )
        self._order: dict[str, int] = {}
        self._sequence = itertools.count(1)
        self._opening = 0
        self.checkpoints = Checkpoints(surroundings, self.quotas, limits)

    def check_accepting(self) -> None:
        """Make sure that new work may begin.

        Raises:
            DrainingError: The server is about to stop.
        """
        if self._draining:
            raise draining_error()

    def drain(self) -> None:
        """Take no new work from now on, and end the streams that rest between two steps."""
        self._draining = True
        for actor in self._actors.values():
            actor.drain()

    def of(self, tenant: str) -> TenantRegistry:
        """Return what a tenant has of this: every call is served from there."""
        return TenantRegistry(self, tenant)

    async def create(
        self, tenant: str, beginning: Beginning, request: CreationRequest | None = None
    ) -> SessionActor:
        """Create a tenant's session: reserve its memory, then take it.

        Args:
            tenant: Whose it is.
            beginning: What it is made from.
            request: What it is made for, to be kept with it.

        Raises:
            NoStorageError: It is to survive, and cannot.
            LimitError: There is no room for it.
            CallerError: torch does not take the spec. Nothing was taken.
        """
        self.check_accepting()
        spec = beginning.spec
        is_durable = spec.durability.mode is not DurabilityMode.NONE
        if is_durable and self._shelf is None:
            raise no_storage_error()
        if len(self._order) + self._opening >= self.limits.sessions_max:
            raise TooManyError(
                f"there are {self.limits.sessions_max} sessions, which is as many as allowed;"
                " delete some, or try again later",
                expected=f"at most {self.limits.sessions_max} sessions",
                retry_after_s=_RETRY_AFTER_S,
            )
        self.quotas.open(tenant)
        self._opening += 1
        try:
            session, count = await self._build(tenant, beginning)
            opened = SessionOpened(
                session_id=secrets.token_hex(_ID_BYTES),
                tenant=tenant,
                optimizer=spec.optimizer.kind,
            )
            actor = SessionActor(session, opened, count, self.quotas.of(tenant), self.surroundings)
            actor.stepped_s = beginning.stepped_s
            if is_durable and self._shelf:
                try:
                    await self._shelf.put(actor, request)
                except BaseException:
                    session.forget()
                    self.quotas.release(tenant, count)
                    raise
        except BaseException:
            self.quotas.close(tenant)
            raise
        finally:
            self._opening -= 1
        self._order[opened.session_id] = next(self._sequence)
        self._enter(actor)
        return actor

    async def find(self, tenant: str, session_id: str) -> SessionActor:
        """Return a tenant's session, which is in use from now on: see Limits.idle_timeout_s.

        One that is parked comes back from disk first.

        Raises:
            SessionNotFoundError: The tenant has none of this id. Another's is answered as none is.
            SessionDamagedError, JournalForeignError: It cannot come back.
            MemoryExhaustedError: There is no room for it now.
        """
        while True:
            actor = self._actors.get(session_id)
            if actor is not None and actor.opened.tenant == tenant:
                actor.touch()
                await actor.made()
                if self._actors.get(session_id) is actor:
                    return actor
                continue  # It has gone meanwhile.
            parked = self._shelf.parked.get(session_id) if self._shelf else None
            if parked is None or parked.opened.tenant != tenant:
                raise _not_found(session_id)
            self.check_accepting()
            await parked.moved(functools.partial(self._bring_back, parked))

    async def page(
        self, tenant: str, *, after: int, count: int
    ) -> tuple[Sequence[Listed], int | None]:
        """Return up to ``count`` of a tenant's sessions, created after the one numbered ``after``.

        Beside them stands the number to go on from; None if these were the last.
        """
        parked = self._shelf.parked if self._shelf else {}
        every: Iterable[Listed] = itertools.chain(self._actors.values(), parked.values())
        own = (
            session
            for session in every
            if session.opened.tenant == tenant and self._order[session.session_id] > after
        )
        later = sorted(own, key=lambda session: self._order[session.session_id])
        page = later[:count]
        next_after = self._order[page[-1].session_id] if len(later) > count else None
        actors = [session for session in page if isinstance(session, SessionActor)]
        await asyncio.gather(*(actor.made() for actor in actors))
        return page, next_after

    @contextmanager
    def resized(self, actor: SessionActor, count: int) -> Iterator[None]:
        """Reserve the ``count`` bytes that a session will need, if that is more than it has.

        For good, unless the block that changes it raises: a momentum takes memory.

        Raises:
            LimitError: There is no room for it. Nothing was changed.
        """
        self.budget.check_session(count, field="optimizer")
        growth = max(0, count + actor.session.history.byte_count - actor.reserved_bytes)
        tenant = actor.opened.tenant
        self.quotas.reserve(tenant, growth, what="the change", field="optimizer")
        try:
            yield
        except BaseException:
            self.quotas.release(tenant, growth)
            raise
        actor.reserved_bytes += growth

    async def delete(self, tenant: str, session_id: str) -> Listed:
        """Forget a tenant's session, and return what it was. Calls that go on in it are ended.

        Raises:
            SessionNotFoundError: As of find().
            SessionFailedError: The disk has failed, and keeps it; it may be deleted again.
        """
        if (actor := self._actors.get(session_id)) and actor.opened.tenant == tenant:
            await actor.made()  # Or it would be listed without what was told of it.
        while (parked := self._parked(tenant, session_id)) and parked.is_moving:
            await parked.stay()
        actor = self._actors.get(session_id)
        session: Listed | None = parked
        if actor is not None and actor.opened.tenant == tenant:
            session = actor
        if session is None:
            raise _not_found(session_id)
        gone = functools.partial(self._gone, session)
        if actor is None or session is not actor:
            assert self._shelf is not None
            assert parked is not None
            await self._shelf.discard(parked, gone)
            return session
        del self._actors[session_id]
        if self._shelf and actor.archive:
            await self._shelf.remove(actor, self._leave(actor), gone)
        else:
            self.creations.forget(session_id)  # At once: nothing can keep it.
            await to_its_end(actor.work.spawn(self._close(actor)))
        return session

    async def expire_idle(
        self, idle_timeout_s: float, durable_idle_timeout_s: float = math.inf
    ) -> list[str]:
        """Delete the sessions that nobody has used for so long, and return their ids.

        Args:
            idle_timeout_s: Of sessions that are in memory only.
            durable_idle_timeout_s: Of durable ones, wherever they are; a restart begins anew. What
                only a newer server can bring back waits for it.
        """
        expired = []
        for session_id in list(self._order):  # Others come and go while one is being deleted.
            actor = self._actors.get(session_id)
            parked = self._shelf.parked.get(session_id) if self._shelf else None
            session = actor or parked
            if session is None or (parked and (parked.is_moving or parked.is_newer)):
                continue
            durable = actor is None or actor.archive is not None
            timeout_s = durable_idle_timeout_s if durable else idle_timeout_s
            if session.idle_s() > timeout_s:
                with suppress(SessionFailedError):  # It has been logged, and is tried again.
                    await self.delete(session.opened.tenant, session_id)
                    expired.append(session_id)
        return expired

    async def park_idle(self, park_timeout_s: float) -> list[str]:
        """Have durable sessions that nobody has used for so long on disk only; return their ids."""
        done = []
        for session_id in list(self._actors):
            actor = self._actors.get(session_id)
            if actor is None or not actor.may_be_parked or actor.idle_s() <= park_timeout_s:
                continue
            if await self._park(actor, park_timeout_s):
                done.append(session_id)
        return done

    async def load(self) -> int:
        """List the sessions that lie on disk, which come back when they are called."""
        if self._shelf is None:
            return 0
        await self.checkpoints.load()
        for parked in await self._shelf.load():
            self._order[parked.session_id] = next(self._sequence)
            self.quotas.adopt(parked.opened.tenant)
            if parked.request:
                self.creations.remember(parked.request, parked.session_id)
        return len(self._shelf.parked)

    async def settle(self) -> None:
        """Make durable what durable sessions have, and let go of the disk; there is no way back."""
        self._draining = True
        for parked in list(self._shelf.parked.values()) if self._shelf else ():
            await parked.stay()
        durable = [actor.archive for actor in self._actors.values() if actor.archive]
        await asyncio.gather(*(archive.settle() for archive in durable))

    async def _park(self, actor: SessionActor, park_timeout_s: float) -> bool:
        """Park a session, unless it cannot be saved, or is used meanwhile."""
        archive, shelf = actor.archive, self._shelf
        assert archive is not None
        assert shelf is not None
        with suppress(Exception):  # It has been logged, and others can be parked.
            await archive.save()
        gone = self._actors.get(actor.session_id) is not actor
        changed = not (archive.is_saved and actor.may_be_parked)
        if gone or changed or actor.idle_s() <= park_timeout_s:
            return False
        del self._actors[actor.session_id]
        await shelf.park(actor, self._leave(actor))
        return True

    async def _bring_back(self, parked: ParkedSession) -> None:
        assert self._shelf is not None
        budget, count = self.quotas.of(parked.opened.tenant), parked.standing().reserved_bytes
        budget.reserve(count, what="the session", field="session_id")
        actor = None
        try:
            while actor is None:
                try:
                    actor = await self._shelf.take(parked, count)
                except OutgrownError as error:
                    growth = error.byte_count - count
                    budget.reserve(growth, what="the session", field="session_id")
                    count += growth
        except BaseException:
            budget.release(count)
            raise
        self._enter(actor)

    def _enter(self, actor: SessionActor) -> None:
        self._actors[actor.session_id] = actor
        self.surroundings.observer.session_opened(actor.opened)
        if self._draining:
            actor.drain()

    async def _leave(self, actor: SessionActor) -> None:
        """Take a session out of memory."""
        if actor.archive:
            actor.archive.stop()
        try:
            await actor.close()
        finally:
            self.quotas.release(actor.opened.tenant, actor.reserved_bytes)
            self.surroundings.observer.session_closed(actor.opened)

    async def _close(self, actor: SessionActor) -> None:
        try:
            await self._leave(actor)
        finally:
            self._gone(actor)

    def _gone(self, session: Listed) -> None:
        """Note that nothing is left of a session."""
        session_id, tenant = session.opened.session_id, session.opened.tenant
        del self._order[session_id]
        self.creations.forget(session_id)
        self.quotas.close(tenant)

    def _parked(self, tenant: str, session_id: str) -> ParkedSession | None:
        parked = self._shelf.parked.get(session_id) if self._shelf else None
        return parked if parked and parked.opened.tenant == tenant else None

    async def _build(self, tenant: str, beginning: Beginning) -> tuple[Session, int]:
        """Reserve a session's memory, and take it; return how much that is beside the session."""
        device, limits, field = self.surroundings.device, self.limits, beginning.field
        count = await self._run(lambda: beginning.measure(device, limits))
        self.budget.check_session(count, field=field)
        self.quotas.reserve(tenant, count, what="the session", field=field)
        try:
            session = await self._run(lambda: beginning.session(device, limits))
        except BaseException:
            self.quotas.release(tenant, count)
            raise
        return session, count

    async def _run(self, work: Callable[[], _T]) -> _T:
        """Run ``work`` in a thread, to its end even if the call that asked for it is cancelled."""
        loop = asyncio.get_running_loop()
        return await to_its_end(loop.run_in_executor(self.surroundings.executor, work))


def _not_found(session_id: str) -> SessionNotFoundError:
    return SessionNotFoundError(
        "there is no session of this id; it was never created, was deleted, or the server"
        " has been restarted",
        field="session_id",
        expected="the id of a session",
        actual=session_id[: 2 * _ID_BYTES],
    )
