"""An event loop in a thread of its own, for tests that are plain functions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

_T = TypeVar("_T")

TIMEOUT_S = 60.0  # Far more than anything here takes, so that a test fails rather than hangs.


class EventLoopThread:
    """Runs coroutines for other threads."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

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
