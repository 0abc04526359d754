"""An event loop without a clock, and threads without a processor: the same seed, the same order.

Time stands still while anything can run, and then jumps to whatever comes next. What is ready runs
in the order in which asyncio would run it, so that nothing is found here that cannot happen there;
what chance decides is when messages arrive, threads get their turn, and disks are done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from random import Random
from typing import Any, TypeVar

_T = TypeVar("_T")

_THREAD_TURN_S = 0.002  # On the mean, until a thread has done what it was given.


class Clockwork(asyncio.BaseEventLoop):
    """An event loop whose time passes only when nothing else can happen."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._selector = self  # asyncio waits here for sockets, of which there are none.
        self.faults: list[str] = []
        """What was raised where nobody could take it."""
        self.set_exception_handler(self._take_fault)

    def time(self) -> float:
        """Return how much time has passed, in seconds."""
        return self._now_s

    def select(self, timeout: float | None) -> list[Any]:
        """Let time pass until the next timer."""
        assert timeout is not None, "nothing is left that could ever happen"
        self._now_s += timeout
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none: nothing comes from outside."""

    def _write_to_self(self) -> None:
        """Nobody has to be woken: there are no other threads."""

    def _take_fault(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.faults.append(f"{context.get('message')}: {context.get('exception')!r}")


class LateThreads(Executor):
    """A pool of threads: what it is given is done later, at once, and in an order of chance."""

    def __init__(self, loop: Clockwork, random: Random) -> None:
        self._loop = loop
        self._random = random
        self.stopped = False
        """Whether the process is gone, with all that it had begun."""

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        """Run ``fn`` later."""
        done: Future[_T] = Future()
        delay_s = self._random.expovariate(1 / _THREAD_TURN_S)
        self._loop.call_later(delay_s, self._run, done, fn, args, kwargs)
        return done

    def _run(self, done: Future[Any], fn: Callable[..., Any], args: Any, kwargs: Any) -> None:
        if self.stopped or not done.set_running_or_notify_cancel():
            return
        try:
            done.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - As of any executor.
            done.set_exception(error)
