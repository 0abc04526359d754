"""Tensor framing: how the bytes of tensors become chunks, and how chunks fill tensors again.

Both sides use it for gradients, parameters, predictions and loss gradients alike. Nothing here
knows what an element is: tensors are sources and targets of bytes, in the order in which they were
announced.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from optserve.limits import CHUNK_BYTES_MAX
from optserve.v1.tensor_pb2 import DataType, TensorHeader

ITEM_BYTES: dict[DataType.ValueType, int] = {
    DataType.DATA_TYPE_BOOL: 1,
    DataType.DATA_TYPE_UINT8: 1,
    DataType.DATA_TYPE_INT8: 1,
    DataType.DATA_TYPE_INT16: 2,
    DataType.DATA_TYPE_INT32: 4,
    DataType.DATA_TYPE_INT64: 8,
    DataType.DATA_TYPE_FP16: 2,
    DataType.DATA_TYPE_FP32: 4,
    DataType.DATA_TYPE_FP64: 8,
    DataType.DATA_TYPE_BF16: 2,
}
"""Bytes of one element of each data type."""


class Chunk(NamedTuple):
    """A slice of a tensor's bytes: TensorChunk, with a view in the place of a copy."""

    tensor: int
    """Position of the tensor, from 0, among those announced."""
    offset: int
    """Of the first byte within the tensor's bytes."""
    data: memoryview
    """The bytes themselves, flat."""


class Source(Protocol):
    """The bytes of a tensor, as they go onto the wire."""

    @property
    def byte_count(self) -> int:
        """How many they are."""
        ...

    def read(self, offset: int, limit: int) -> memoryview:
        """Return from 1 to ``limit`` bytes from ``offset``, which is before the end.

        Fewer than there are if that is easier. Valid until the next call.
        """
        ...


class Target(Protocol):
    """Where the bytes of a tensor go, as they come off the wire."""

    @property
    def byte_count(self) -> int:
        """How many there must be."""
        ...

    def write(self, offset: int, data: memoryview) -> None:
        """Take bytes. They come in order, without gaps, and may end within an element."""
        ...


class Part(NamedTuple):
    """Some consecutive bytes of a tensor, to be sent."""

    tensor: int
    """Position of the tensor, from 0, among those announced."""
    offset: int
    """Of the first byte within the tensor's bytes."""
    source: Source
    """The bytes of the part."""


class Buffer:
    """Memory that holds a tensor's bytes exactly as they travel: a source, and a target."""

    __slots__ = ("byte_count", "view")

    def __init__(self, view: memoryview) -> None:
        """Read from, and write to, a flat view of bytes."""
        self.view = view
        self.byte_count = len(view)

    def read(self, offset: int, limit: int) -> memoryview:
        """Return a view of the memory itself."""
        return self.view[offset : offset + limit]

    def write(self, offset: int, data: memoryview) -> None:
        """Copy bytes into the memory."""
        self.view[offset : offset + len(data)] = data  # copy: message to tensor.


def whole(source: Source) -> bytes:
    """Return all of a source's bytes, for a message that holds a tensor at once."""
    parts: list[bytes] = []
    offset = 0
    while offset < source.byte_count:
        parts.append(bytes(source.read(offset, source.byte_count - offset)))
        offset += len(parts[-1])
    return parts[0] if len(parts) == 1 else b"".join(parts)


class FramingError(Exception):
    """A chunk does not continue its tensor, or a tensor is not complete.

    ``tensor`` is its position, from 0.
    """

    def __init__(self, message: str, *, tensor: int, expected: str, actual: str) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.expected = expected
        self.actual = actual


class ChunkError(FramingError):
    """A chunk leaves a gap, overlaps, or belongs to no announced tensor."""


class ByteCountError(FramingError):
    """A tensor got more or fewer bytes than it has."""


def data_type_name(data_type: DataType.ValueType) -> str:
    """Return the name of a data type as the Open Inference Protocol has it: ``FP32``."""
    return DataType.Name(data_type).removeprefix("DATA_TYPE_")


def byte_count(header: TensorHeader) -> int:
    """Return how many bytes the tensor has.

    Exact for any shape: Python's integers do not overflow.
    """
    return math.prod(header.shape) * ITEM_BYTES[header.data_type]


def split(
    sources: Iterable[Source], chunk_bytes_max: int = CHUNK_BYTES_MAX
) -> Iterator[list[Chunk]]:
    """Yield the sources' bytes as the chunks of one message after the other.

    Small tensors are packed together.

    Args:
        sources: One for each tensor, in the announced order. Read when its message is asked for,
            so it must not change before the iterator is exhausted.
        chunk_bytes_max: How many bytes of data a message may hold.
    """
    parts = (Part(tensor, 0, source) for tensor, source in enumerate(sources))
    return split_parts(parts, chunk_bytes_max)


def split_parts(
    parts: Iterable[Part], chunk_bytes_max: int = CHUNK_BYTES_MAX
) -> Iterator[list[Chunk]]:
    """Yield the bytes of parts of tensors; see split()."""
    chunks: list[Chunk] = []
    room = chunk_bytes_max
    for tensor, begin, source in parts:
        offset, end = 0, source.byte_count
        while offset < end:
            data = source.read(offset, room)
            chunks.append(Chunk(tensor, begin + offset, data))
            offset += len(data)
            room -= len(data)
            if room == 0 or offset < end:
                yield chunks
                chunks, room = [], chunk_bytes_max
    if chunks:
        yield chunks


class Assembly:
    """Tensors that are being filled by chunks."""

    def __init__(self, targets: Sequence[Target]) -> None:
        """Fill ``targets``, one for each announced tensor."""
        self._targets = targets
        self.received = [0] * len(targets)
        """How many bytes of each tensor have come."""

    def add(self, chunks: Iterable[Chunk]) -> int:
        """Write chunks where they belong; return how many bytes they are.

        Raises:
            ChunkError: A chunk leaves a gap, overlaps or belongs nowhere; those before it have been
                written.
            ByteCountError: A chunk runs past the end of its tensor; those before it have been
                written.
        """
        targets, received, total = self._targets, self.received, 0
        for tensor, offset, data in chunks:
            count = len(data)
            if tensor >= len(targets):
                raise ChunkError(
                    f"a chunk belongs to tensor {tensor}; {len(targets)} were announced, from 0",
                    tensor=tensor,
                    expected=f"below {len(targets)}",
                    actual=str(tensor),
                )
            if offset != received[tensor] or count == 0:
                raise ChunkError(
                    f"a chunk of tensor {tensor} has {count} bytes at offset {offset};"
                    f" the next one must have bytes at offset {received[tensor]}",
                    tensor=tensor,
                    expected=f"offset {received[tensor]}",
                    actual=f"offset {offset}",
                )
            target = targets[tensor]
            if offset + count > target.byte_count:
                raise _byte_count_error(tensor, target.byte_count, offset + count)
            target.write(offset, data)
            received[tensor] = offset + count
            total += count
        return total

    def finish(self) -> None:
        """Check that every tensor is complete.

        Raises:
            ByteCountError: One is not.
        """
        for tensor, target in enumerate(self._targets):
            if self.received[tensor] != target.byte_count:
                raise _byte_count_error(tensor, target.byte_count, self.received[tensor])


def _byte_count_error(tensor: int, expected: int, actual: int) -> ByteCountError:
    return ByteCountError(
        f"tensor {tensor} has {expected} bytes; {actual} came",
        tensor=tensor,
        expected=f"{expected} bytes",
        actual=f"{actual} bytes",
    )
