"""Tensor framing: how the bytes of tensors become chunks, and how chunks fill tensors again.

Both sides use it for gradients, parameters, predictions and loss gradients alike. Nothing here
knows what an element is: tensors are buffers of bytes, in the order in which they were announced.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from optserve.limits import CHUNK_BYTES_MAX
from optserve.v1.tensor_pb2 import DataType, TensorChunk, TensorChunks, TensorHeader

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
    buffers: Sequence[memoryview], chunk_bytes_max: int = CHUNK_BYTES_MAX
) -> Iterator[TensorChunks]:
    """Yield the buffers' bytes in messages, small tensors packed together.

    Args:
        buffers: One flat view of bytes for each tensor, in the announced order. Read when its
            message is asked for, so it must not change before the iterator is exhausted.
        chunk_bytes_max: How many bytes of data a message may hold.
    """
    chunks: list[TensorChunk] = []
    room = chunk_bytes_max
    for tensor, buffer in enumerate(buffers):
        offset = 0
        while offset < len(buffer):
            # copy: tensor to bytes; protobuf's is next.
            data = bytes(buffer[offset : offset + room])
            chunks.append(TensorChunk(tensor=tensor, offset=offset, data=data))
            offset += len(data)
            room -= len(data)
            if room == 0:
                yield TensorChunks(chunks=chunks)
                chunks, room = [], chunk_bytes_max
    if chunks:
        yield TensorChunks(chunks=chunks)


class Assembly:
    """Tensors that are being filled by chunks."""

    def __init__(self, targets: Sequence[memoryview]) -> None:
        """Fill ``targets``.

        One writable flat view of bytes for each announced tensor, as long as the tensor.
        """
        self._targets = targets
        self._received = [0] * len(targets)

    def add(self, chunks: Iterable[TensorChunk]) -> int:
        """Write chunks where they belong; return how many bytes they are.

        Raises:
            ChunkError: A chunk leaves a gap, overlaps or belongs nowhere; those before it have been
                written.
            ByteCountError: A chunk runs past the end of its tensor; those before it have been
                written.
        """
        targets, received, total = self._targets, self._received, 0
        for chunk in chunks:
            tensor, offset = chunk.tensor, chunk.offset
            # copy: message to bytes; every access makes one, so there is only this.
            data = chunk.data
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
            if offset + count > len(targets[tensor]):
                raise _byte_count_error(tensor, len(targets[tensor]), offset + count)
            targets[tensor][offset : offset + count] = data  # copy: bytes to tensor.
            received[tensor] = offset + count
            total += count
        return total

    def finish(self) -> None:
        """Check that every tensor is complete.

        Raises:
            ByteCountError: One is not.
        """
        for tensor, target in enumerate(self._targets):
            if self._received[tensor] != len(target):
                raise _byte_count_error(tensor, len(target), self._received[tensor])


def _byte_count_error(tensor: int, expected: int, actual: int) -> ByteCountError:
    return ByteCountError(
        f"tensor {tensor} has {expected} bytes; {actual} came",
        tensor=tensor,
        expected=f"{expected} bytes",
        actual=f"{actual} bytes",
    )
