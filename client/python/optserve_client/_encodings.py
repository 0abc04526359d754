"""Encodings of FP32 elements with NumPy: what tensor.proto says of each, piece by piece.

The arrays of blocks lie in the processor's cache; each pass over them is one call of NumPy, into
memory that was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from optserve.encodings import BLOCK_ELEMENTS, PIECE_ELEMENTS, SCALE_BYTES
from optserve.v1.tensor_pb2 import Encoding

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]

_CODE_MAX = np.float32(127)
_SCALE_MIN = np.float32(2.0**-126)  # The smallest normal number: below it a quotient is no code.


class Codec(Protocol):
    """An encoding's elements to bytes and back. For one thread at a time: it has scratch memory."""

    def encode(self, values: Floats, data: Bytes) -> None:
        """Write the bytes of at least one element; of blocks, at most PIECE_ELEMENTS.

        Args:
            values: Flat and contiguous.
            data: As long as the encoded elements.
        """
        ...

    def decode(self, data: Bytes, values: Floats) -> None:
        """Write the elements that the bytes stand for; sizes as in encode()."""
        ...


class Half:
    """ENCODING_BF16 and ENCODING_FP16: elements of 16 bits, which NumPy and ml_dtypes convert."""

    def __init__(self, dtype: DTypeLike, nan: int) -> None:
        """Convert to ``dtype``, whose NaN has the bits ``nan``."""
        self._dtype = np.dtype(dtype)
        self._nan = nan

    def encode(self, values: Floats, data: Bytes) -> None:
        """Round to nearest, ties to even."""
        with np.errstate(all="ignore"):  # Overflow is infinity, as the contract has it.
            np.copyto(data.view(self._dtype), values, casting="unsafe")
        if np.isnan(values.max()):  # Whatever sign and payload they have, others know one.
            data.view("<u2")[np.isnan(values)] = self._nan

    def decode(self, data: Bytes, values: Floats) -> None:
        """Widen, exactly."""
        np.copyto(values, data.view(self._dtype), casting="unsafe")


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


CODECS: Mapping[Encoding.ValueType, Callable[[], Codec]] = {
    Encoding.ENCODING_BF16: lambda: Half(ml_dtypes.bfloat16, 0x7FC0),
    Encoding.ENCODING_FP16: lambda: Half(np.float16, 0x7E00),
    Encoding.ENCODING_INT8_BLOCKS: Int8Blocks,
}
"""What to make for each encoding."""
