"""A lock that many readers may hold together, or one writer alone.

For coroutines of one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class SharedLock:
    """Writers go before readers that come after them: a flow of readers does not keep them out.

    Letting go never waits, so that a cancelled holder cannot leave the lock behind.
    """

    def __init__(self) -> None:
        self._readers = 0
        self._writing = False
        self._writers_waiting = 0
        self._waiters: set[asyncio.Future[None]] = set()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Hold the lock together with other readers."""
        await self._wait(lambda: not self._writing and not self._writers_waiting)
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
            self._wake()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Hold the lock alone."""
        self._writers_waiting += 1
        try:
            await self._wait(lambda: not self._writing and not self._readers)
            self._writing = True
        finally:
            self._writers_waiting -= 1
            self._wake()  # A writer that gave up waiting may have held readers back.
        try:
            yield
        finally:
            self._writing = False
            self._wake()

    async def _wait(self, free: Callable[[], bool]) -> None:
        while not free():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
