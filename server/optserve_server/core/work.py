"""Where a session's work runs: off the event loop, one writer at a time, always to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

from optserve_server.core.lock import SharedLock

_T = TypeVar("_T")


class Work:
    """Runs the work of one session."""

    def __init__(self, executor: Executor) -> None:
        """Compute in ``executor``."""
        self._executor = executor
        self._tasks: set[asyncio.Task[Any]] = set()
        self.lock = SharedLock()
        """Held alone by whoever changes the session, and together by those who read parameters."""

    async def run(self, work: Callable[[], _T]) -> _T:
        """Run ``work`` in a thread. A call that is cancelled meanwhile ends when the work has."""
        loop = asyncio.get_running_loop()
        return await to_its_end(loop.run_in_executor(self._executor, work))

    async def run_alone(self, work: Callable[[], _T], check: Callable[[], None]) -> _T:
        """Run ``work`` in a thread while nobody reads or changes the session.

        Args:
            work: What to run. A call that is cancelled meanwhile ends when the work has.
            check: Called once the session is held, before the work; may refuse it.
        """

        async def alone() -> _T:
            async with self.lock.exclusive():
                check()
                return await self.run(work)

        return await to_its_end(self.spawn(alone()))

    def spawn(self, coroutine: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Start work that belongs to no call: none can cancel it."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)  # asyncio itself keeps only a weak reference.
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # Looked at, or asyncio complains when the call that waited has gone.


async def to_its_end(future: asyncio.Future[_T]) -> _T:
    """Wait for a future, and let a cancellation through only when it is done.

    So what the caller holds for the work, such as reserved memory, it holds as long as the work
    does.
    """
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if not future.cancelled():
            await asyncio.wait([future])
            if not future.cancelled():
                future.exception()  # Looked at: the caller will never know.
        raise
