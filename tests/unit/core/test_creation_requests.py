"""Creations: one session for each request, whoever asks, waits, leaves or fails meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from optserve_server.core.creations import CreationRequest, Creations
from optserve_server.core.errors import MemoryExhaustedError, RequestConflictError


class Workshop:
    """Makes sessions when it is told to, and knows which it has undone."""

    def __init__(self) -> None:
        self.creations = Creations()
        self.made: list[str] = []
        self.undone: list[str] = []
        self.may_finish = asyncio.Event()
        self.may_undo = asyncio.Event()

    async def create(self) -> str:
        try:
            await self.may_finish.wait()
        except asyncio.CancelledError:
            await self.may_undo.wait()
            self.undone.append("session")
            raise
        self.made.append(f"session-{len(self.made)}")
        return self.made[-1]

    def ask(self, content: bytes = b"c", tenant: str = "") -> asyncio.Task[str]:
        """Begin a call with one and the same request id."""
        request = CreationRequest(tenant=tenant, request_id="r", digest=content)
        return asyncio.create_task(self.creations.once(request, self.create))


def _run(test: Callable[[Workshop], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(10):
            await test(Workshop())

    asyncio.run(run())


async def _settle() -> None:
    """Let everything happen that can."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_who_comes_while_it_is_being_made_gets_the_same() -> None:
    async def test(shop: Workshop) -> None:
        calls = [shop.ask() for _ in range(3)]
        await _settle()
        shop.may_finish.set()
        assert await asyncio.gather(*calls) == ["session-0"] * 3
        assert await shop.ask() == "session-0"
        shop.creations.forget("session-0")
        assert await shop.ask() == "session-1"

    _run(test)


def test_sessions_of_one_request_that_were_brought_together_are_forgotten_one_by_one() -> None:
    async def test(shop: Workshop) -> None:
        shop.may_finish.set()
        request = CreationRequest(tenant="", request_id="r", digest=b"c")
        for session_id in ("one", "other"):
            shop.creations.remember(request, session_id)
        shop.creations.forget("one")
        assert await shop.ask() == "other"
        shop.creations.forget("other")
        assert await shop.ask() == "session-0"

    _run(test)


def test_each_tenant_has_its_own_requests() -> None:
    async def test(shop: Workshop) -> None:
        shop.may_finish.set()
        assert await shop.ask(tenant="a") != await shop.ask(tenant="b", content=b"d")

    _run(test)


def test_other_content_is_a_conflict_even_while_the_first_is_being_made() -> None:
    async def test(shop: Workshop) -> None:
        first = shop.ask()
        await _settle()
        with pytest.raises(RequestConflictError):
            await shop.ask(content=b"other")
        shop.may_finish.set()
        assert await first == "session-0"

    _run(test)


def test_as_long_as_one_waits_it_is_made_and_then_it_is_undone() -> None:
    async def test(shop: Workshop) -> None:
        leaves, stays = shop.ask(), shop.ask()
        await _settle()
        leaves.cancel()
        await _settle()
        assert shop.undone == []
        stays.cancel()
        shop.may_undo.set()
        await _settle()
        assert len(shop.undone) == 1
        assert not shop.made

    _run(test)


def test_who_comes_while_it_is_being_undone_gets_another() -> None:
    async def test(shop: Workshop) -> None:
        gone = shop.ask()
        await _settle()
        gone.cancel()
        await _settle()
        late = shop.ask()
        await _settle()
        shop.may_finish.set()
        assert not late.done()
        shop.may_undo.set()
        assert await late == "session-0"
        assert len(shop.undone) == 1

    _run(test)


def test_what_is_refused_is_refused_to_all_who_wait_and_can_be_tried_again() -> None:
    async def test(shop: Workshop) -> None:
        async def refuse() -> str:
            await shop.may_finish.wait()
            raise MemoryExhaustedError("no room")

        request = CreationRequest(tenant="", request_id="r", digest=b"c")
        calls = [asyncio.create_task(shop.creations.once(request, refuse)) for _ in range(2)]
        await _settle()
        shop.may_finish.set()
        for call in calls:
            with pytest.raises(MemoryExhaustedError):
                await call
        assert await shop.ask() == "session-0"

    _run(test)
