"""Calls between simulated clients and a server: messages come late, and at some point no more.

The server's end is what gRPC gives to a method: an iterator of requests, and a context to write to.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from random import Random
from typing import Any

from faults.machines.simulation.clockwork import Clockwork
from refusals import RefusedError

from optserve.wire import Chunk
from optserve_server.core.errors import OptserveError
from optserve_server.rpc.access import Access

_LATENCY_S = 0.001  # Of a message, on the mean.
_NOTICED_S = 0.01  # How soon a broken connection is noticed by an end that is told, on the mean.
_UNNOTICED_S = 8.0  # And by one that is not, and finds out by itself.

Method = Callable[..., Awaitable[Any]]

_ACCESS = Access()


class LostError(Exception):
    """The connection is broken: nobody knows what has come of the last messages."""


class _Pipe:
    """One direction: messages arrive in their order, each a while after it was sent."""

    def __init__(self, loop: Clockwork, random: Random) -> None:
        self._loop = loop
        self._random = random
        self._arrived: deque[Any] = deque()
        self._arrival = asyncio.Event()
        self._last_s = 0.0
        self.cut = False
        """Whether nothing arrives any more."""

    def send(self, message: Any) -> None:
        """Let a message arrive later."""
        delay_s = self._random.expovariate(1 / _LATENCY_S)
        self._last_s = max(self._last_s + 1e-9, self._loop.time() + delay_s)
        self._loop.call_at(self._last_s, self._arrive, message)

    def insert(self, message: Any) -> None:
        """Let a message arrive at once, though nothing else does."""
        self._arrived.append(message)
        self._arrival.set()

    async def receive(self) -> Any:
        """Wait for the next message."""
        while not self._arrived:
            self._arrival.clear()
            await self._arrival.wait()
        return self._arrived.popleft()

    def _arrive(self, message: Any) -> None:
        if not self.cut:
            self.insert(message)


class _HalfClosed:
    """What travels behind the last message of a client."""


class _End:
    """What travels behind the last message of the server."""

    def __init__(self, refusal: OptserveError | None) -> None:
        self.refusal = refusal


class Line:
    """One call, as both of its ends have it."""

    def __init__(
        self,
        loop: Clockwork,
        random: Random,
        fault: Callable[[str, BaseException | None], None],
        peer: str,
    ) -> None:
        """Connect.

        Args:
            loop: Where everything happens.
            random: Decides when messages arrive, and ends notice.
            fault: Told what the server must not do.
            peer: What the server sees of the client.
        """
        self._loop = loop
        self._random = random
        self._fault = fault
        self._peer = peer
        self._upward, self._downward = _Pipe(loop, random), _Pipe(loop, random)
        self._serving: asyncio.Task[None] | None = None
        self._killed = False
        self._context = copy_context()

    # The client's end.

    def begin(self, method: Method, context: Context, *, streams: bool) -> asyncio.Task[None]:
        """Have the server serve the call, in its context.

        A method that takes one message gets it when it comes.
        """
        serving = self._serve(method, streams=streams)
        self._serving = self._loop.create_task(serving, context=context)
        return self._serving

    def send(self, message: Any) -> None:
        """Send a message."""
        self._upward.send(message)

    def half_close(self) -> None:
        """Send no more."""
        self._upward.send(_HalfClosed())

    async def receive(self) -> Any:
        """Wait for the next message; None at the end of the call.

        Raises:
            LostError: The connection is broken.
            RefusedError: The server has ended the call.
        """
        message = await self._downward.receive()
        if isinstance(message, LostError):
            raise message
        if not isinstance(message, _End):
            return message
        if message.refusal:
            raise RefusedError.from_error(message.refusal)
        return None

    @property
    def is_broken(self) -> bool:
        """Whether nothing arrives any more."""
        return self._upward.cut

    def break_later(self, mean_s: float) -> None:
        """Break the connection at some moment from now on, if the call is not over then."""
        self._loop.call_later(self._random.expovariate(1 / mean_s), self.break_now)

    def break_now(self) -> None:
        """Break the connection; each end notices in its own time."""
        if self._upward.cut:
            return
        self._upward.cut = self._downward.cut = True
        # The client's context: the server may be gone by then, with all that it had planned.
        self._loop.call_later(
            self._notice_s(), self._downward.insert, LostError(), context=self._context
        )
        self._loop.call_later(self._notice_s(), self._cancel, context=self._context)

    def _notice_s(self) -> float:
        told = self._random.random() < 0.7
        return self._random.expovariate(1 / (_NOTICED_S if told else _UNNOTICED_S))

    # The server's end.

    def __aiter__(self) -> Line:
        return self

    async def __anext__(self) -> Any:
        message = await self._upward.receive()
        if isinstance(message, _HalfClosed):
            raise StopAsyncIteration
        return message

    async def write(self, message: Any) -> None:
        """Send an answer; tensors as they are now."""
        if isinstance(message, list):
            message = [
                Chunk(chunk.tensor, chunk.offset, memoryview(bytes(chunk.data)))
                for chunk in message
            ]
        self._downward.send(message)
        await asyncio.sleep(0)

    def peer(self) -> str:
        """Say where the client is."""
        return self._peer

    def kill(self) -> None:
        """End with the server's process, which does not wait for anybody."""
        self._killed = True
        self.break_now()
        self._cancel()

    def _cancel(self) -> None:
        if self._serving:
            self._serving.cancel()

    async def _serve(self, method: Method, *, streams: bool) -> None:
        refusal: OptserveError | None = None
        try:
            await _ACCESS.admit(self)  # type: ignore[arg-type] # It asks nobody.
            answer = await method(self if streams else await anext(self), self)
            if answer is not None:
                self._downward.send(answer)
        except OptserveError as error:
            refusal = error
        except asyncio.CancelledError:
            if not (self._upward.cut or self._killed):
                self._fault("a call was cancelled that nobody has broken off", None)
            return
        except BaseException as error:  # noqa: BLE001 - INTERNAL: what no client may ever see.
            if not self._killed:
                self._fault("internal error", error)
            self.break_now()
            return
        self._downward.send(_End(refusal))
