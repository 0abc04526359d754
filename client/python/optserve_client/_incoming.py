"""Tensors that arrive: the memory that they fill, and what fills it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from optserve.v1.tensor_pb2 import Encoding, TensorHeader
from optserve.wire import Assembly, Buffer, Chunk, FramingError, Target, byte_count
from optserve_client._encoded import PLAIN, parameter_targets
from optserve_client.errors import ProtocolError
from optserve_client.tensors import DTYPES, Array, allocate, bytes_of


def uncounted(_count: int) -> None:
    """Be told of bytes that nobody counts."""


class Room:
    """Memory for tensors that arrive, and may do so again and again."""

    def __init__(self, headers: Sequence[TensorHeader]) -> None:
        """Take the memory for what ``headers`` say; they must have been checked."""
        arrays = allocate(headers)
        self.buffers = [Buffer(bytes_of(array)) for array in arrays]
        """Where the bytes go."""
        self.arrays = [_read_only(array) for array in arrays]
        """The tensors, which nobody but the buffers can write to."""


class Incoming:
    """Tensors that are arriving in chunks, after their headers."""

    def __init__(
        self,
        room: Room,
        advance: Callable[[int], None] = uncounted,
        targets: Sequence[Target] | None = None,
    ) -> None:
        """Fill ``room``, and tell ``advance`` of each piece how many bytes it had.

        What is encoded goes through ``targets``, which decode it into the room's buffers.
        """
        self._room = room
        self._assembly = Assembly(room.buffers if targets is None else targets)
        self._advance = advance

    def add(self, chunks: list[Chunk]) -> None:
        """Write chunks where they belong."""
        try:
            count = self._assembly.add(chunks)
        except FramingError as error:
            raise ProtocolError(f"the server's chunks are wrong: {error}") from error
        self._advance(count)

    def finish(self) -> list[Array]:
        """Return the tensors, read-only, once all their bytes have come."""
        try:
            self._assembly.finish()
        except FramingError as error:
            raise ProtocolError(f"the server's chunks are incomplete: {error}") from error
        return self._room.arrays


def arrays_of(
    headers: Sequence[TensorHeader],
    parameters: Sequence[bytes],
    encoding: Encoding.ValueType,
    reference: Sequence[Array] | None = None,
) -> list[Array]:
    """Return the read-only arrays that an answer in one message holds.

    Args:
        headers: Of the parameters.
        parameters: Their bytes. What is not encoded is not copied.
        encoding: Of the bytes.
        reference: See ``parameter_targets``.
    """
    if encoding == PLAIN:
        return [_array(*each) for each in zip(headers, parameters, strict=True)]
    room = Room(headers)
    targets = parameter_targets(encoding, room.buffers, reference)
    for header, target, data in zip(headers, targets, parameters, strict=True):
        _check_byte_count(header, target.byte_count, data)
        target.write(0, memoryview(data))
    return room.arrays


def _array(header: TensorHeader, data: bytes) -> Array:
    _check_byte_count(header, byte_count(header), data)
    return np.frombuffer(data, DTYPES[header.data_type]).reshape(tuple(header.shape))


def _check_byte_count(header: TensorHeader, expected: int, data: bytes) -> None:
    if len(data) != expected:
        raise ProtocolError(f"the server sent {len(data)} bytes for parameter '{header.name}'")


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view
