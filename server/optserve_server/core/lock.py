"""A lock that many readers may hold together, or one writer alone.

For coroutines of one event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    exclusive: bool
    granted: asyncio.Future[None]


class SharedLock:
    """Strictly first come, first served, so that neither readers nor writers are kept out.

    Letting go never waits, so that a cancelled holder cannot leave the lock behind.
    """

    def __init__(self) -> None:
        self._readers = 0
        self._writing = False
        self._waiters: deque[_Waiter] = deque()

    @property
    def is_free(self) -> bool:
        """Whether nobody holds it, or waits for it."""
        return not (self._writing or self._readers or self._waiters)

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Hold the lock together with other readers."""
        await self._acquire(exclusive=False)
        try:
            yield
        finally:
            self._release(exclusive=False)

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Hold the lock alone."""
        await self._acquire(exclusive=True)
        try:
            yield
        finally:
            self._release(exclusive=True)

    async def _acquire(self, *, exclusive: bool) -> None:
        waiter = _Waiter(exclusive, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        self._grant()
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if not waiter.granted.cancelled():  # It was granted in the moment of the cancellation.
                self._release(exclusive=exclusive)
            else:
                self._grant()  # It may have stood before others that can go now.
            raise

    def _release(self, *, exclusive: bool) -> None:
        if exclusive:
            self._writing = False
        else:
            self._readers -= 1
        self._grant()

    def _grant(self) -> None:
        """Give the lock to those in front, as far as they can have it together."""
        while self._waiters:
            waiter = self._waiters[0]
            if not waiter.granted.cancelled():
                if self._writing or (waiter.exclusive and self._readers):
                    return
                self._writing = waiter.exclusive
                self._readers += not waiter.exclusive
                waiter.granted.set_result(None)
            self._waiters.popleft()
