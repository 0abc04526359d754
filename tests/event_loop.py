"""An event loop in a thread of its own, for tests that are plain functions."""

from __future__ import annotations

import asyncio
import errno
import functools
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

_T = TypeVar("_T")

TIMEOUT_S = 60.0  # Far more than anything here takes, so that a test fails rather than hangs.


@functools.cache
def _shared_loop() -> asyncio.AbstractEventLoop:
    """Start the one event loop of this process's servers, which ends with the process.

    grpc.aio has one poller for all loops of a process, and loses events when some come and go
    (grpc/grpc#42357).
    """
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(_tell)
    threading.Thread(target=loop.run_forever, name="servers", daemon=True).start()
    return loop


def _tell(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what a callback has raised, as asyncio does, but for what cannot be helped.

    grpc.aio's poller goes with the last server, and with it what the loop is about to read from.
    """
    error, handle = context.get("exception"), context.get("handle")
    gone = isinstance(error, OSError) and error.errno == errno.EBADF
    if not (gone and isinstance(handle, asyncio.Handle) and handle.cancelled()):
        loop.default_exception_handler(context)


class EventLoopThread:
    """Runs coroutines for other threads, all of them on one loop."""

    def __init__(self) -> None:
        self._loop = _shared_loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the loop to the others."""

    def start(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Begin to run ``work``."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run ``work`` to its end."""
        return self.start(work).result(TIMEOUT_S)

    def call(self, function: Callable[[], _T]) -> _T:
        """Call a plain function on the loop."""

        async def called() -> _T:
            return function()

        return self.run(called())
