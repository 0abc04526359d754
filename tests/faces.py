"""Both faces of the client: one test body is run through the blocking and the asyncio one."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, cast

import optserve_client as optserve
from optserve_client import aio

Connect: TypeAlias = Callable[..., optserve.Client]
"""``connect`` of a face, which shows the blocking one's signature."""

Face: TypeAlias = Literal["blocking", "asyncio"]


class Awaited:
    """A client or a session of the asyncio face: what it would have awaited is run to its end."""

    def __init__(self, target: aio.Client | aio.Session, runner: asyncio.Runner) -> None:
        self._target = target
        self._runner = runner

    def __getattr__(self, name: str) -> object:
        value = getattr(self._target, name)
        return self._blocking(value) if inspect.ismethod(value) else value

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._runner.run(self._target.__aexit__(kind, error, traceback))

    def _blocking(self, method: Callable[..., Any]) -> Callable[..., object]:
        async def play(*args: object, **kwargs: object) -> object:
            pending = method(*args, **kwargs)
            if isinstance(pending, AsyncIterator):
                return [element async for element in pending]
            result = await pending
            return Awaited(result, self._runner) if isinstance(result, aio.Session) else result

        return lambda *args, **kwargs: self._runner.run(play(*args, **kwargs))


@contextmanager
def connecting(face: Face, config: optserve.ClientConfig) -> Iterator[Connect]:
    """Connect with a face, and on these terms unless the test itself says how."""
    if face == "blocking":
        yield lambda *args, **kwargs: optserve.connect(*args, **{"config": config, **kwargs})
        return

    async def opened(*args: Any, **kwargs: Any) -> aio.Client:  # noqa: ANN401  (As connect's.)
        return await aio.connect(*args, **{"config": config, **kwargs})

    with asyncio.Runner() as runner:
        yield lambda *args, **kwargs: cast(
            "optserve.Client", Awaited(runner.run(opened(*args, **kwargs)), runner)
        )
