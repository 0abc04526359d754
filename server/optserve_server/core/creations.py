"""Which request has made which session, so that a request that comes again makes no second one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from optserve_server.core.errors import RequestConflictError


@dataclass(frozen=True, slots=True, kw_only=True)
class CreationRequest:
    """A request to make a session, as far as it is known again."""

    tenant: str
    """Who asks."""
    request_id: str
    """What the tenant calls it."""
    digest: bytes
    """What identifies its content."""


class Creations:
    """Makes one session for each request. Everything is called on the event loop."""

    def __init__(self) -> None:
        """Start without requests."""
        self._by_key: dict[tuple[str, str], _Creation] = {}
        self._by_session: dict[str, _Creation] = {}

    async def once(
        self, request: CreationRequest, create: Callable[[], Coroutine[Any, Any, str]]
    ) -> str:
        """Return the id of the session that a request has made, or makes now.

        A session that is being made is waited for; it is given up when nobody waits any more.

        Args:
            request: What has come.
            create: Makes the session, and returns its id; leaves nothing behind if it raises.

        Raises:
            RequestConflictError: The request's id belongs to a request of other content.
            OptserveError: As of ``create``; the same request may be tried again.
        """
        while True:
            creation = self._by_key.get(_key(request)) or self._begin(request, create)
            if creation.request != request:
                raise RequestConflictError(
                    f"request {request.request_id!r} has made a session of another spec, or with"
                    " other values; choose another id",
                    field="request_id",
                    expected="the request that came first",
                    actual=request.request_id,
                )
            if creation.session_id:
                return creation.session_id
            assert creation.task is not None
            if not creation.given_up:
                return await creation.session()
            await asyncio.wait([creation.task])  # Then it has left nothing, and can be made anew.

    def remember(self, request: CreationRequest, session_id: str) -> None:
        """Note which session a request has made."""
        creation = _Creation(request=request, session_id=session_id)
        self._by_key[_key(request)] = self._by_session[session_id] = creation

    def forget(self, session_id: str) -> None:
        """Forget what has made a session, which is gone."""
        creation = self._by_session.pop(session_id, None)
        # Another one may have the id, of a session whose directory was copied to here.
        if creation and self._by_key.get(_key(creation.request)) is creation:
            del self._by_key[_key(creation.request)]

    def _begin(
        self, request: CreationRequest, create: Callable[[], Coroutine[Any, Any, str]]
    ) -> _Creation:
        task = asyncio.create_task(self._make(request, create))
        creation = self._by_key[_key(request)] = _Creation(request=request, task=task)

        def end(task: asyncio.Task[str]) -> None:
            if task.cancelled() or task.exception():
                del self._by_key[_key(request)]

        task.add_done_callback(end)  # Before those of anybody who waits.
        return creation

    async def _make(
        self, request: CreationRequest, create: Callable[[], Coroutine[Any, Any, str]]
    ) -> str:
        session_id = await create()
        self.remember(request, session_id)  # At once: it may be deleted as soon as it is there.
        return session_id


@dataclass(slots=True, kw_only=True, eq=False)
class _Creation:
    """A session that was made, or is being made."""

    request: CreationRequest
    task: asyncio.Task[str] | None = None
    """Makes the session. None: it is there."""
    session_id: str = ""
    """Empty: it is being made."""
    waiting: int = 0
    """How many calls wait for it."""
    given_up: bool = False
    """Whether it is being undone."""

    async def session(self) -> str:
        """Wait for the session; return its id."""
        assert self.task is not None
        self.waiting += 1
        try:
            return await asyncio.shield(self.task)
        finally:
            self.waiting -= 1
            if not self.waiting and not self.task.done():
                self.given_up = True
                self.task.cancel()


def _key(request: CreationRequest) -> tuple[str, str]:
    return request.tenant, request.request_id
