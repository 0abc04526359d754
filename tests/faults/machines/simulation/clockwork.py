"""An event loop without a clock, and threads without a processor: the same seed, the same order.

Time stands still while anything can run, and then jumps to whatever comes next. What is ready runs
in the order in which asyncio would run it, so that nothing is found here that cannot happen there;
what chance decides is when messages arrive, threads get their turn, and disks are done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextvars import Context
from random import Random
from typing import Any, TypeVar

from faults.disks import CrashError

_T = TypeVar("_T")


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

    def forget(self, is_gone: Callable[[Context], bool]) -> None:
        """Let nothing happen that was to happen in a context that is gone."""
        for handle in [*self._ready, *self._scheduled]:  # type: ignore[attr-defined] # asyncio's.
            if is_gone(handle._context):
                handle.cancel()

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
        error = context.get("exception")
        if not isinstance(error, CrashError):
            self.faults.append(f"{context.get('message')}: {error!r}")


class LateThreads(Executor):
    """A pool of threads: what it is given is done later, at once, and in an order of chance."""

    def __init__(
        self, loop: Clockwork, random: Random, crashed: Callable[[], None], *, turn_s: float
    ) -> None:
        """Do it on ``loop``.

        Args:
            loop: Where everything happens.
            random: Decides when.
            crashed: Called if the process ends by what is done.
            turn_s: How long it takes, on the mean.
        """
        self._turn_s = turn_s
        self._loop = loop
        self._random = random
        self._crashed = crashed
        self._waiting: set[Future[Any]] = set()
        self._stopped = False

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        """Run ``fn`` later."""
        done: Future[_T] = Future()
        if self._stopped:
            done.set_exception(CrashError())
            return done
        self._waiting.add(done)
        delay_s = self._random.expovariate(1 / self._turn_s)
        self._loop.call_later(delay_s, self._run, done, fn, args, kwargs)
        return done

    def stop(self) -> None:
        """End with the process: nothing is done any more."""
        self._stopped = True
        for done in self._waiting:
            if done.set_running_or_notify_cancel():
                done.set_exception(CrashError())
        self._waiting.clear()

    def _run(self, done: Future[Any], fn: Callable[..., Any], args: Any, kwargs: Any) -> None:
        if self._stopped:
            return
        self._waiting.discard(done)
        if not done.set_running_or_notify_cancel():
            return
        try:
            done.set_result(fn(*args, **kwargs))
        except CrashError as error:
            self._crashed()
            done.set_exception(error)
        except BaseException as error:  # noqa: BLE001 - As of any executor.
            done.set_exception(error)
