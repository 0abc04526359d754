"""A wire on which things go wrong: slow, sliced, stalled, half-closed, cut or reset, by a seed.

Beside relay.py, which counts what passes and is cut by hand, this one does its harm by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

_T = TypeVar("_T")

_READ_BYTES = 1 << 16
# On, and no time: what is on its way is thrown away, and the peer gets a reset in place of an end.
_LINGER_NOT = struct.pack("ii", 1, 0)


class End(enum.StrEnum):
    """How a connection ends before its time, as both of its ends see it."""

    CLOSE = "close"
    """Both are told that nothing more will come."""
    RESET = "reset"
    """Both are told that the connection is broken, and what was on its way is lost."""
    HALF_CLOSE = "half-close"
    """One is told that nothing more will come; the way back is open."""
    STALL = "stall"
    """Nobody is told anything, and one way is dead; at last it is a reset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What becomes of one connection."""

    latency_s: float = 0.0
    """How much later everything arrives, in both directions."""
    bytes_per_s: float | None = None
    """How much passes in a second, in each direction. None: whatever the machine can."""
    slice_bytes_max: int | None = None
    """Into how small pieces what comes is cut, each of any size up to this. None: it is not."""
    end: End | None = None
    """How it ends. None: when one of its ends wants to."""
    end_after_bytes: int = 0
    """How many bytes have passed by then in ``end_upward`` direction."""
    end_upward: bool = True
    """Whether the bytes from client to server are counted, and not those that come back."""
    stall_s: float = 1.0
    """How long a stall lasts before the connection is reset."""


class BadWire:
    """Passes on what comes on a free port, as each connection's fate has it."""

    def __init__(self, target: str, fate_of: Callable[[int], Fate], *, seed: int = 0) -> None:
        """Connect whoever comes to ``target``, "HOST:PORT".

        Args:
            target: The server.
            fate_of: Given the number of a connection, from 0, it says what becomes of it.
            seed: What the sizes of slices come from.
        """
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._fate_of = fate_of
        self._seed = seed
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self.ended: Counter[End] = Counter()
        """How many connections have ended before their time, and how."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="bad-wire")
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        """Take no more connections, and end those that there are."""
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        number = next(self._numbers)
        try:
            upper_reader, upper_writer = await asyncio.open_connection(*self._target)
        except OSError:  # The server is not there just now: nor is the wire.
            _reset(writer)
            return
        ends = (writer, upper_writer)
        random = Random(f"{self._seed} {number}")
        connection = _Connection(self._fate_of(number), ends, random, self.ended)
        try:
            await connection.pass_on(reader, upper_reader)
        except asyncio.CancelledError:
            pass  # By close(): there is nobody else to tell.
        finally:
            for end in ends:
                end.transport.abort()
            self._tasks.discard(task)

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class _EndedError(Exception):
    """The connection has ended before its time."""


class _Connection:
    """Two directions between two ends, and what becomes of them."""

    def __init__(
        self,
        fate: Fate,
        ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
        random: Random,
        ended: Counter[End],
    ) -> None:
        self._fate = fate
        self._client, self._server = ends
        self._random = random
        self._ended = ended

    async def pass_on(
        self, from_client: asyncio.StreamReader, from_server: asyncio.StreamReader
    ) -> None:
        """Pass on what comes until both directions have ended."""
        upward = asyncio.create_task(self._flow(from_client, self._server, upward=True))
        downward = asyncio.create_task(self._flow(from_server, self._client, upward=False))
        try:
            await asyncio.gather(upward, downward)
        except _EndedError:
            pass
        except OSError:  # One of the ends has broken it off.
            _reset(self._client)
            _reset(self._server)
        finally:
            upward.cancel()
            downward.cancel()
            await asyncio.gather(upward, downward, return_exceptions=True)

    async def _flow(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, upward: bool
    ) -> None:
        fate, passed = self._fate, 0
        ends_here = fate.end is not None and fate.end_upward == upward
        while data := await source.read(_READ_BYTES):
            if fate.latency_s:
                await asyncio.sleep(fate.latency_s)
            for piece in self._pieces(data):
                room = fate.end_after_bytes - passed if ends_here else len(piece)
                target.write(piece[: max(0, room)])
                await target.drain()
                passed += len(piece)
                if fate.bytes_per_s:
                    await asyncio.sleep(len(piece) / fate.bytes_per_s)
                if ends_here and passed >= fate.end_after_bytes:
                    await self._end(target)
        with contextlib.suppress(OSError):
            target.write_eof()

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        most = self._fate.slice_bytes_max
        at = 0
        while at < len(data):
            size = self._random.randint(1, most) if most else len(data)
            yield data[at : at + size]
            at += size

    async def _end(self, target: asyncio.StreamWriter) -> None:
        """End the connection as it is to be; ``target`` is where the counted bytes went."""
        assert self._fate.end
        self._ended[self._fate.end] += 1  # Before anybody can see it.
        match self._fate.end:
            case End.CLOSE:
                for end in (self._client, self._server):
                    end.close()
                raise _EndedError
            case End.HALF_CLOSE:
                target.write_eof()
                await asyncio.sleep(self._fate.stall_s)
            case End.STALL:
                await asyncio.sleep(self._fate.stall_s)
        _reset(self._client)
        _reset(self._server)
        raise _EndedError


def _reset(end: asyncio.StreamWriter) -> None:
    """Break a connection, so that its peer sees a reset."""
    raw = end.get_extra_info("socket")
    with contextlib.suppress(OSError):  # It is broken already.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    end.transport.abort()


@contextmanager
def bad_wire(target: str, fate_of: Callable[[int], Fate], *, seed: int = 0) -> Iterator[BadWire]:
    """Have a bad wire to ``target`` for as long as the block runs."""
    wire = BadWire(target, fate_of, seed=seed)
    try:
        yield wire
    finally:
        wire.close()
