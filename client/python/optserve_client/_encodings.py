"""Encodings of FP32 elements with NumPy: what tensor.proto says of each, piece by piece.

The arrays of a piece lie in the processor's cache; each pass over them is one call of NumPy, into
memory that was there before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from optserve.encodings import BLOCK_ELEMENTS, PIECE_ELEMENTS, SCALE_BYTES
from optserve.v1.tensor_pb2 import Encoding

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]

_BF16_NAN = 0x7FC0
_FP16_NAN = 0x7E00
_CODE_MAX = np.float32(127)
_SCALE_MIN = np.float32(2.0**-126)  # The smallest normal number: below it a quotient is no code.
_SHIFT = np.uint32(16)
_HALF = np.uint32(0x7FFF)  # Just less than half of what is rounded away.


class Codec(Protocol):
    """An encoding's elements to bytes and back. For one thread at a time: it has scratch memory."""

    def encode(self, values: Floats, data: Bytes) -> None:
        """Write the bytes of at least one element, and at most PIECE_ELEMENTS.

        Args:
            values: Flat and contiguous.
            data: As long as the encoded elements.
        """
        ...

    def decode(self, data: Bytes, values: Floats) -> None:
        """Write the elements that the bytes stand for; sizes as in encode()."""
        ...


class Bf16:
    """ENCODING_BF16: integer arithmetic on the bits, for NumPy has no bfloat16."""

    def __init__(self) -> None:
        self._bits = np.empty(PIECE_ELEMENTS, "<u4")

    def encode(self, values: Floats, data: Bytes) -> None:
        """Round to nearest, ties to even: add half less one, and one more if what stays is odd."""
        bits, halves = values.view("<u4"), data.view("<u2")
        rounded = self._bits[: len(bits)]
        np.right_shift(bits, _SHIFT, out=rounded)
        np.bitwise_and(rounded, np.uint32(1), out=rounded)
        np.add(rounded, _HALF, out=rounded)
        np.add(rounded, bits, out=rounded)
        np.copyto(halves, rounded.view("<u2")[1::2])
        if np.isnan(values.max()):  # Rounding carries some of them over to infinity, or to zero.
            halves[np.isnan(values)] = _BF16_NAN

    def decode(self, data: Bytes, values: Floats) -> None:
        """Widen, exactly."""
        bits = values.view("<u4")
        np.copyto(bits, data.view("<u2"))
        np.left_shift(bits, _SHIFT, out=bits)


class Fp16:
    """ENCODING_FP16: NumPy's own conversions."""

    def encode(self, values: Floats, data: Bytes) -> None:
        """Round to nearest, ties to even."""
        with np.errstate(all="ignore"):  # Overflow is infinity, as the contract has it.
            np.copyto(data.view("<f2"), values, casting="unsafe")
        if np.isnan(values.max()):
            data.view("<u2")[np.isnan(values)] = _FP16_NAN

    def decode(self, data: Bytes, values: Floats) -> None:
        """Widen, exactly."""
        np.copyto(values, data.view("<f2"))


class Int8Blocks:
    """ENCODING_INT8_BLOCKS."""

    def __init__(self) -> None:
        self._quotients = np.empty(PIECE_ELEMENTS, np.float32)

    def encode(self, values: Floats, data: Bytes) -> None:
        """Scale each block so that its largest magnitude becomes 127, and round."""
        whole = len(values) // BLOCK_ELEMENTS
        count = whole * BLOCK_ELEMENTS
        if whole:
            size = whole * (SCALE_BYTES + BLOCK_ELEMENTS)
            self._encode_blocks(values[:count].reshape(whole, -1), data[:size].reshape(whole, -1))
            data = data[size:]
        if count < len(values):
            self._encode_blocks(values[count:].reshape(1, -1), data.reshape(1, -1))

    def decode(self, data: Bytes, values: Floats) -> None:
        """Multiply the codes of each block by its scale."""
        whole = len(values) // BLOCK_ELEMENTS
        count = whole * BLOCK_ELEMENTS
        if whole:
            size = whole * (SCALE_BYTES + BLOCK_ELEMENTS)
            _decode_blocks(data[:size].reshape(whole, -1), values[:count].reshape(whole, -1))
            data = data[size:]
        if count < len(values):
            _decode_blocks(data.reshape(1, -1), values[count:].reshape(1, -1))

    def _encode_blocks(self, values: Floats, data: Bytes) -> None:
        """Encode blocks of one length; both arrays have a row for each."""
        quotients = self._quotients[: values.size].reshape(values.shape)
        np.abs(values, out=quotients)
        with np.errstate(all="ignore"):  # What is not finite, or overflows, is dealt with below.
            scales = quotients.max(axis=1, keepdims=True) / _CODE_MAX
            finite = np.isfinite(scales * _CODE_MAX)
            # Divided by infinity, every finite element becomes code 0.
            divisors = np.where(scales >= _SCALE_MIN, scales, np.float32(np.inf))
            np.divide(values, divisors, out=quotients)
        scales[scales < _SCALE_MIN] = 0
        if not finite.all():
            scales[~finite] = np.nan
            quotients[~finite[:, 0]] = 0
        np.rint(quotients, out=quotients)
        data[:, :SCALE_BYTES] = scales.astype("<f4", copy=False).view(np.uint8)
        np.copyto(data[:, SCALE_BYTES:].view(np.int8), quotients, casting="unsafe")


def _decode_blocks(data: Bytes, values: Floats) -> None:
    scales = np.ascontiguousarray(data[:, :SCALE_BYTES]).view("<f4")
    codes = data[:, SCALE_BYTES:].view(np.int8)
    np.multiply(codes, scales, out=values, dtype=np.float32)


CODECS: Mapping[Encoding.ValueType, type[Codec]] = {
    Encoding.ENCODING_BF16: Bf16,
    Encoding.ENCODING_FP16: Fp16,
    Encoding.ENCODING_INT8_BLOCKS: Int8Blocks,
}
"""What to make for each encoding."""
