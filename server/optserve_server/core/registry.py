"""All sessions of a server: who may be created, who is there, who is gone."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from optserve_server.core.actor import SessionActor
from optserve_server.core.admission import Budget, session_bytes
from optserve_server.core.creations import Creations
from optserve_server.core.device import Device
from optserve_server.core.errors import (
    MemoryExhaustedError,
    SessionNotFoundError,
    TooManyError,
    draining_error,
)
from optserve_server.core.events import SessionOpened
from optserve_server.core.limits import Limits
from optserve_server.core.quotas import Quotas
from optserve_server.core.session import Session
from optserve_server.core.spec import SessionSpec
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
        self._quotas = Quotas(limits)
        self.creations = Creations()
        self._draining = False
        self._actors: dict[str, SessionActor] = {}
        self._order: dict[str, int] = {}
        self._sequence = itertools.count(1)
        self._opening = 0

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

    async def create(self, tenant: str, spec: SessionSpec) -> SessionActor:
        """Create a tenant's session: reserve its memory, then take it.

        Raises:
            LimitError: There is no room for it.
            CallerError: torch does not take the spec. Nothing was taken.
        """
        self.check_accepting()
        if len(self._actors) + self._opening >= self.limits.sessions_max:
            raise TooManyError(
                f"there are {self.limits.sessions_max} sessions, which is as many as allowed;"
                " delete some, or try again later",
                expected=f"at most {self.limits.sessions_max} sessions",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._quotas.open(tenant)
        self._opening += 1
        try:
            session, count = await self._build(tenant, spec)
        except BaseException:
            self._quotas.close(tenant)
            raise
        finally:
            self._opening -= 1
        surroundings = self.surroundings
        opened = SessionOpened(
            session_id=secrets.token_hex(_ID_BYTES),
            tenant=tenant,
            optimizer=spec.optimizer.kind,
        )
        actor = SessionActor(session, opened, count, surroundings)
        self._actors[opened.session_id] = actor
        self._order[opened.session_id] = next(self._sequence)
        surroundings.observer.session_opened(opened)
        return actor

    def find(self, tenant: str, session_id: str) -> SessionActor:
        """Return a tenant's session, which is in use from now on: see Limits.idle_timeout_s.

        Raises:
            SessionNotFoundError: The tenant has none of this id. Another's is answered as none is.
        """
        actor = self._actors.get(session_id)
        if actor is None or actor.opened.tenant != tenant:
            raise SessionNotFoundError(
                "there is no session of this id; it was never created, was deleted, or the server"
                " has been restarted",
                field="session_id",
                expected="the id of a session",
                actual=session_id[: 2 * _ID_BYTES],
            )
        actor.touch()
        return actor

    def page(
        self, tenant: str, *, after: int, count: int
    ) -> tuple[Sequence[SessionActor], int | None]:
        """Return up to ``count`` of a tenant's sessions, created after the one numbered ``after``.

        Beside them stands the number to go on from; None if these were the last.
        """
        own = (actor for actor in self._actors.values() if actor.opened.tenant == tenant)
        later = [actor for actor in own if self._order[actor.session_id] > after]
        page = later[:count]
        return page, self._order[page[-1].session_id] if len(later) > count else None

    @contextmanager
    def resized(self, actor: SessionActor, count: int) -> Iterator[None]:
        """Reserve the ``count`` bytes that a session will need, if that is more than it has.

        For good, unless the block that changes it raises: a momentum takes memory.

        Raises:
            LimitError: There is no room for it. Nothing was changed.
        """
        self.budget.check_session(count, field="optimizer")
        growth = max(0, count - actor.reserved_bytes)
        tenant = actor.opened.tenant
        self._reserve(tenant, growth, what="the change", field="optimizer")
        try:
            yield
        except BaseException:
            self._release(tenant, growth)
            raise
        actor.reserved_bytes += growth

    async def delete(self, tenant: str, session_id: str) -> SessionActor:
        """Forget a tenant's session, and return what it was. Calls that go on in it are ended.

        Raises:
            SessionNotFoundError: As of find().
        """
        actor = self.find(tenant, session_id)
        del self._actors[session_id]
        del self._order[session_id]
        self.creations.forget(session_id)
        await to_its_end(actor.work.spawn(self._close(actor)))
        return actor

    async def expire_idle(self, idle_timeout_s: float) -> list[str]:
        """Delete the sessions that nobody has used for so long, and return their ids."""
        expired = []
        for session_id in list(self._actors):
            actor = self._actors.get(session_id)  # Others come and go while one is being deleted.
            if actor is not None and actor.idle_s() > idle_timeout_s:
                await self.delete(actor.opened.tenant, session_id)
                expired.append(session_id)
        return expired

    async def _close(self, actor: SessionActor) -> None:
        try:
            await actor.close()
        finally:
            self._release(actor.opened.tenant, actor.reserved_bytes)
            self._quotas.close(actor.opened.tenant)
            self.surroundings.observer.session_closed(actor.opened)

    async def _build(self, tenant: str, spec: SessionSpec) -> tuple[Session, int]:
        """Reserve a session's memory, and take it; return how much that is beside the session."""
        surroundings = self.surroundings
        count = await self._run(lambda: self._measure(spec))
        self.budget.check_session(count, field="parameters")
        self._reserve(tenant, count, what="the session", field="parameters")
        try:
            session = await self._run(lambda: Session(spec, surroundings.device, self.limits))
        except BaseException:
            self._release(tenant, count)
            raise
        return session, count

    def _reserve(self, tenant: str, count: int, *, what: str, field: str) -> None:
        """Promise a session's memory, of the tenant's and of all; arguments as of Budget.reserve.

        Raises:
            MemoryExhaustedError: There is not that much left.
        """
        self._quotas.reserve(tenant, count, what=what, field=field)
        try:
            self.budget.reserve(count, what=what, field=field)
        except MemoryExhaustedError:
            self._quotas.release(tenant, count)
            raise

    def _release(self, tenant: str, count: int) -> None:
        """Give back what was promised."""
        self._quotas.release(tenant, count)
        self.budget.release(count)

    def _measure(self, spec: SessionSpec) -> int:
        """Return how much memory a session will take, after a look at everything else about it."""
        parameters = tuple(dataclasses.replace(each, shape=(0,)) for each in spec.parameters)
        Session(dataclasses.replace(spec, parameters=parameters), Device("cpu"), self.limits)
        return session_bytes(spec, self.surroundings.device.torch)

    async def _run(self, work: Callable[[], _T]) -> _T:
        """Run ``work`` in a thread, to its end even if the call that asked for it is cancelled."""
        loop = asyncio.get_running_loop()
        return await to_its_end(loop.run_in_executor(self.surroundings.executor, work))
