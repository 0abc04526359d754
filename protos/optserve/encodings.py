"""Encodings: where the bytes of encoded elements may be cut, for those who send and receive them.

What the bytes say is the business of whoever holds the elements: NumPy in the client, torch in the
server. Here they are units of a fixed size, two bytes of one element or a block of 256, which are
encoded piece by piece when they are sent, and decoded piece by piece as they arrive: no tensor is
ever there in encoded form as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from optserve.v1.tensor_pb2 import Encoding

BLOCK_ELEMENTS = 256
"""Elements of a block of ENCODING_INT8_BLOCKS; the last one of a tensor may have fewer."""

SCALE_BYTES = 4
"""What stands before the codes of a block."""

PIECE_ELEMENTS = 127 * BLOCK_ELEMENTS
"""Elements of blocks that are converted at a time, at most.

127 KiB of FP32, so that what is made of them on the way stays in the processor's second cache. From
32,768 on torch would give each operation to several threads, and on a busy server wait for the
slowest of them each time.
"""
# Nothing is kept of halves on the way, and a conversion is a few calls for any size: at each, a
# thread may have to wait for the interpreter. 1 MiB of FP32, and half a message.
_HALVES_AT_A_TIME = 1 << 18


class _Unit(NamedTuple):
    """What of an encoding can be encoded on its own."""

    elements: int
    byte_count: int
    piece_elements: int
    """How many are converted at a time, at most; of whole units."""


_HALF = _Unit(1, 2, _HALVES_AT_A_TIME)
_UNITS: dict[Encoding.ValueType, _Unit] = {
    Encoding.ENCODING_BF16: _HALF,
    Encoding.ENCODING_FP16: _HALF,
    Encoding.ENCODING_INT8_BLOCKS: _Unit(
        BLOCK_ELEMENTS, SCALE_BYTES + BLOCK_ELEMENTS, PIECE_ELEMENTS
    ),
}

_READ_BYTES_MAX = 1 << 20  # 1 MiB: a whole message of chunks.


def encoded_bytes(encoding: Encoding.ValueType, element_count: int) -> int:
    """Return how many bytes so many elements take, from the beginning of a unit.

    Args:
        encoding: Any but ENCODING_UNSPECIFIED.
        element_count: From 0; exact for any.
    """
    elements, size, _ = _UNITS[encoding]
    units, rest = divmod(element_count, elements)
    return units * size + (rest + SCALE_BYTES if rest else 0)


def complete_elements(encoding: Encoding.ValueType, byte_count: int, element_count: int) -> int:
    """Return how many of a tensor's elements its first bytes hold in full.

    Args:
        encoding: Any but ENCODING_UNSPECIFIED.
        byte_count: How many bytes there are.
        element_count: How many elements the tensor has.
    """
    elements, size, _ = _UNITS[encoding]
    if byte_count == encoded_bytes(encoding, element_count):
        return element_count
    return byte_count // size * elements


class EncodingSource:
    """Elements that are encoded when they are sent: a wire.Source. Read once, from the front."""

    def __init__(
        self,
        encoding: Encoding.ValueType,
        element_count: int,
        encode: Callable[[int, int, memoryview], None],
    ) -> None:
        """Send ``element_count`` elements.

        Args:
            encoding: Of the bytes.
            element_count: From 0.
            encode: Given a range of elements, which begins with a unit, it writes their bytes into
                the view. Blocks come up to PIECE_ELEMENTS at a time. Called once for each element,
                in order.
        """
        self.byte_count = encoded_bytes(encoding, element_count)
        self._encoding = encoding
        self._element_count = element_count
        self._encode = encode
        self._scratch: memoryview | None = None
        self._begin = self._end = 0  # Of what the scratch holds, in bytes of the tensor.

    def read(self, offset: int, limit: int) -> memoryview:
        """Return from 1 to ``limit`` bytes from ``offset``; valid until the next call."""
        if self._scratch is None:
            # Memory that has been written to once: here, and not page by page in each step.
            self._scratch = memoryview(bytearray(min(self.byte_count, _READ_BYTES_MAX)))
        if offset == self._end:
            self._advance(limit)
        begin = offset - self._begin
        return self._scratch[begin : min(begin + limit, self._end - self._begin)]

    def _advance(self, limit: int) -> None:
        """Encode about ``limit`` bytes more."""
        assert self._scratch is not None
        elements, size, piece_elements = _UNITS[self._encoding]
        self._begin = self._end
        first = self._begin // size * elements
        room = min(limit, len(self._scratch))
        last = self._element_count
        if self.byte_count - self._begin > room:
            last = min(first + max(1, room // size) * elements, last)
        for at in range(first, last, piece_elements):
            stop = min(at + piece_elements, last)
            begin = self._end - self._begin
            count = encoded_bytes(self._encoding, stop - at)
            self._encode(at, stop, self._scratch[begin : begin + count])
            self._end += count


class DecodingTarget:
    """Elements that are decoded as they arrive: a wire.Target."""

    def __init__(
        self,
        encoding: Encoding.ValueType,
        element_count: int,
        decode: Callable[[int, int, memoryview], None],
    ) -> None:
        """Receive ``element_count`` elements.

        Args:
            encoding: Of the bytes.
            element_count: From 0.
            decode: Given a range of elements, as in EncodingSource, and their bytes. Called once
                for each element, in order.
        """
        self.byte_count = encoded_bytes(encoding, element_count)
        self._encoding = encoding
        self._element_count = element_count
        self._decode = decode
        self._held = bytearray()  # The beginning of a unit whose end has not come yet.

    def write(self, offset: int, data: memoryview) -> None:
        """Take bytes, which may end anywhere."""
        size = _UNITS[self._encoding].byte_count
        if self._held:
            begin = offset - len(self._held)
            missing = min(begin + size, self.byte_count) - offset
            self._held += data[:missing]  # copy: less than a unit.
            if len(data) < missing:
                return
            self._decode_units(begin, memoryview(self._held))
            self._held = bytearray()
            offset, data = offset + missing, data[missing:]
        at_end = offset + len(data) == self.byte_count
        whole = len(data) if at_end else len(data) // size * size
        self._decode_units(offset, data[:whole])
        self._held += data[whole:]  # copy: less than a unit.

    def _decode_units(self, offset: int, data: memoryview) -> None:
        """Decode whole units, the first of which begins at ``offset``."""
        elements, size, piece_elements = _UNITS[self._encoding]
        piece_bytes = piece_elements // elements * size
        first = offset // size * elements
        for begin in range(0, len(data), piece_bytes):
            piece = data[begin : begin + piece_bytes]
            last = min(first + -(-len(piece) // size) * elements, self._element_count)
            self._decode(first, last, piece)
            first = last
