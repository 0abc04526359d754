"""Tensors over a stream: chunks in, chunks out, never waiting for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from google.protobuf.message import Message
from torch import Tensor

from optserve import wire
from optserve_server.core.errors import (
    ByteCountMismatchError,
    ChunkOutOfOrderError,
    EventOutOfOrderError,
    LimitExceededError,
    StalledError,
)
from optserve_server.core.limits import Limits
from optserve_server.core.tensors import byte_view

_T = TypeVar("_T")
_MessageT = TypeVar("_MessageT", bound=Message)


class Views:
    """Buffers over tensors, which are made once for as long as the tensors are the same."""

    def __init__(self) -> None:
        self._tensors: Sequence[Tensor] | None = None
        self._buffers: list[wire.Buffer] = []

    def of(self, tensors: Sequence[Tensor]) -> list[wire.Buffer]:
        """Return a buffer over each of the tensors: contiguous, on the CPU."""
        if tensors is not self._tensors:  # The very same list, not an equal one.
            self._tensors, self._buffers = tensors, buffers(tensors)
        return self._buffers


def buffers(tensors: Iterable[Tensor]) -> list[wire.Buffer]:
    """Return a buffer over each of the tensors: contiguous, on the CPU."""
    return [wire.Buffer(byte_view(tensor)) for tensor in tensors]


class Receiver:
    """Fills tensors from chunks; errors name the field in which the tensor was announced."""

    def __init__(
        self, targets: Sequence[wire.Target], field_of: Callable[[int], str], limits: Limits
    ) -> None:
        """Fill ``targets``, in the announced order.

        Args:
            targets: What to fill.
            field_of: Path of the field that announced the tensor at a position.
            limits: In force.
        """
        self._targets = targets
        self._assembly = wire.Assembly(targets)
        self._field_of = field_of
        self._chunk_bytes_max = limits.chunk_bytes_max

    def add(self, chunks: Sequence[wire.Chunk]) -> int:
        """Write the chunks where they belong; return how many bytes they are.

        Raises:
            CallerError: One does not continue its tensor.
            LimitExceededError: There is more in it than allowed.
        """
        try:
            count = self._assembly.add(chunks)
        except wire.ByteCountError as error:
            raise self._mismatch(error) from None
        except wire.ChunkError as error:
            raise ChunkOutOfOrderError(
                str(error),
                field=self._field_of(error.tensor),
                expected=error.expected,
                actual=error.actual,
            ) from None
        if count == 0:
            raise ChunkOutOfOrderError(
                "a message holds no chunk", field="chunks", expected="a chunk"
            )
        if count > self._chunk_bytes_max:
            raise LimitExceededError(
                f"a message holds {count} bytes of chunks; {self._chunk_bytes_max} are allowed",
                field="chunks",
                expected=f"at most {self._chunk_bytes_max} bytes",
                actual=f"{count} bytes",
            )
        return count

    def received(self, tensor: int) -> int:
        """Return how many bytes of a tensor have come."""
        return self._assembly.received[tensor]

    def is_complete(self, tensor: int) -> bool:
        """Return whether all bytes of a tensor have come."""
        return self._assembly.received[tensor] == self._targets[tensor].byte_count

    def finish(self) -> None:
        """Check that every tensor is complete.

        Raises:
            ByteCountMismatchError: One is not.
        """
        try:
            self._assembly.finish()
        except wire.ByteCountError as error:
            raise self._mismatch(error) from None

    def _mismatch(self, error: wire.ByteCountError) -> ByteCountMismatchError:
        return ByteCountMismatchError(
            str(error),
            field=self._field_of(error.tensor),
            expected=error.expected,
            actual=error.actual,
        )


async def receive(
    events: AsyncIterator[Message | list[wire.Chunk]], receiver: Receiver, limits: Limits
) -> None:
    """Fill a receiver with chunks until the client half-closes.

    Raises:
        EventOutOfOrderError: Another event came.
        StalledError: The next one did not come in time.
        OptserveError: As of Receiver.
    """
    while (event := await next_or_none(events, limits)) is not None:
        if not isinstance(event, list):
            raise EventOutOfOrderError("chunks follow `begin`", field="event", expected="chunks")
        receiver.add(event)
    receiver.finish()


async def first(
    events: AsyncIterator[_MessageT | list[wire.Chunk]], what: str, wanted: str, limits: Limits
) -> _MessageT:
    """Return the first event of a stream.

    Args:
        events: Of the stream.
        what: The stream, for errors: "an upload".
        wanted: Name of the event that it begins with.
        limits: In force.

    Raises:
        EventOutOfOrderError: It is another one, or the stream ended before it.
        StalledError: It did not come in time.
    """
    event = await next_or_none(events, limits)
    if event is None:
        raise EventOutOfOrderError(
            f"the stream ended before its first event; {wanted!r} comes first",
            field="event",
            expected=wanted,
        )
    if isinstance(event, list) or event.WhichOneof("event") != wanted:
        raise EventOutOfOrderError(f"{what} begins with `{wanted}`", field="event", expected=wanted)
    return event


async def next_or_none(events: AsyncIterator[_T], limits: Limits) -> _T | None:
    """Return the next event of a transfer; None if the client has half-closed.

    Raises:
        StalledError: It did not come in time.
    """
    try:
        return await in_time(anext(events), limits)
    except StopAsyncIteration:
        return None


async def in_time(transfer: Awaitable[_T], limits: Limits) -> _T:
    """Wait for one message to come or to go.

    Raises:
        StalledError: It took longer than allowed.
    """
    try:
        async with asyncio.timeout(limits.stall_timeout_s):
            return await transfer
    except TimeoutError:
        raise stalled(limits) from None


@asynccontextmanager
async def on_the_whole(byte_count: int, limits: Limits) -> AsyncIterator[None]:
    """Give a transfer the time that it may take on the whole, beside that of each message.

    What it holds, others may wait for: a peer that is just fast enough with every message would
    keep them waiting for hours.

    Args:
        byte_count: Of its tensors.
        limits: In force.

    Raises:
        StalledError: The block took longer.
    """
    seconds = limits.stall_timeout_s + byte_count / limits.transfer_rate_min
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise StalledError(
            f"the client was too slow: {byte_count} bytes may take {seconds:.3g} s",
            expected=f"at least {limits.transfer_rate_min:g} bytes in a second",
        ) from None


def stalled(limits: Limits) -> StalledError:
    """Return what says that the client is too slow."""
    return StalledError(
        f"the client neither sent nor read for {limits.stall_timeout_s:g} s",
        expected=f"a message within {limits.stall_timeout_s:g} s",
    )


async def send(
    sources: Sequence[wire.Source],
    write: Callable[[list[wire.Chunk]], Awaitable[None]],
    limits: Limits,
) -> int:
    """Write tensors as chunks; return how many bytes they are.

    Args:
        sources: Held still by the caller until this is done.
        write: Takes the chunks of one message.
        limits: For the size of the chunks and the time that one may take.
    """
    for chunks in wire.split(sources, limits.chunk_bytes_max):
        await in_time(write(chunks), limits)
    return sum(source.byte_count for source in sources)
