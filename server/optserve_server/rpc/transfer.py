"""Tensors over a stream: chunks in, chunks out, never waiting for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from torch import Tensor

from optserve import wire
from optserve.v1.tensor_pb2 import TensorChunks
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


class Receiver:
    """Fills tensors from chunks; errors name the field in which the tensor was announced."""

    def __init__(
        self, targets: Sequence[Tensor], field_of: Callable[[int], str], limits: Limits
    ) -> None:
        """Fill ``targets``: contiguous CPU tensors, in the announced order.

        Args:
            targets: What to fill.
            field_of: Path of the field that announced the tensor at a position.
            limits: In force.
        """
        self._assembly = wire.Assembly([byte_view(target) for target in targets])
        self._field_of = field_of
        self._chunk_bytes_max = limits.chunk_bytes_max

    def add(self, message: TensorChunks) -> int:
        """Write the chunks where they belong; return how many bytes they are.

        Raises:
            CallerError: One does not continue its tensor.
            LimitExceededError: There is more in it than allowed.
        """
        try:
            count = self._assembly.add(message.chunks)
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


async def first(events: AsyncIterator[_T], wanted: str, limits: Limits) -> _T:
    """Return the first event of a stream.

    Raises:
        EventOutOfOrderError: The stream ended before it.
        StalledError: It did not come in time.
    """
    event = await next_or_none(events, limits)
    if event is None:
        raise EventOutOfOrderError(
            f"the stream ended before its first event; {wanted!r} comes first",
            field="event",
            expected=wanted,
        )
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
        raise StalledError(
            f"the client neither sent nor read for {limits.stall_timeout_s:g} s",
            expected=f"a message within {limits.stall_timeout_s:g} s",
        ) from None


async def send(
    tensors: Sequence[Tensor], write: Callable[[TensorChunks], Awaitable[None]], limits: Limits
) -> int:
    """Write tensors as chunks; return how many bytes they are.

    Args:
        tensors: Contiguous, on the CPU, held still by the caller until this is done.
        write: Takes one message of chunks.
        limits: For the size of the chunks and the time that one may take.
    """
    views = [byte_view(tensor) for tensor in tensors]
    for chunks in wire.split(views, limits.chunk_bytes_max):
        await in_time(write(chunks), limits)
    return sum(len(view) for view in views)
