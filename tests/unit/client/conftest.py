"""Both faces of the client: one test body is run through the blocking and the asyncio one."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Self, cast

import pytest
from server_process import ServerProcess

import optserve_client as optserve
from optserve_client import aio

Connect = Callable[..., optserve.Client]


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


@pytest.fixture(params=["blocking", "asyncio", "shared-memory"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Connect with either face, and in either lane unless the test itself says how."""
    lane: optserve.Lane = "shm" if request.param == "shared-memory" else "grpc"
    config = optserve.ClientConfig(lane=lane)
    if request.param != "asyncio":
        yield lambda *args, **kwargs: optserve.connect(*args, **{"config": config, **kwargs})
        return

    async def opened(*args: Any, **kwargs: Any) -> aio.Client:  # noqa: ANN401  (As connect's.)
        return await aio.connect(*args, **{"config": config, **kwargs})

    with asyncio.Runner() as runner:
        yield lambda *args, **kwargs: cast(
            "optserve.Client", Awaited(runner.run(opened(*args, **kwargs)), runner)
        )


@pytest.fixture
def client(connect: Connect, server: ServerProcess) -> Iterator[optserve.Client]:
    """Yield a client of a real server, with either face and in either lane."""
    with connect(server.address) as client:
        yield client
