"""Encoded elements: the same bytes from NumPy and from torch, within the contract's bounds."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from optserve.encodings import PIECE_ELEMENTS, DecodingTarget, EncodingSource, encoded_bytes
from optserve.v1.tensor_pb2 import Encoding
from optserve_client import _encodings as with_numpy
from optserve_server.core import encodings as with_torch
from optserve_server.core.spec import Encoding as CoreEncoding

Floats = NDArray[np.float32]

BF16, FP16 = Encoding.ENCODING_BF16, Encoding.ENCODING_FP16
INT8_BLOCKS = Encoding.ENCODING_INT8_BLOCKS
ENCODINGS = [
    pytest.param(BF16, id="bf16"),
    pytest.param(FP16, id="fp16"),
    pytest.param(INT8_BLOCKS, id="int8-blocks"),
]
LARGEST = float(np.finfo(np.float32).max)
SUBNORMAL = 2.0**-149
# Every corner that the contract names, on both sides.
CORNERS = np.array(
    [
        *(0.0, SUBNORMAL, 2.0**-126, 2.0**-133, 2.0**-134, 3 * 2.0**-135, 1.0, LARGEST),
        *(65519.996, 65520.0, 2.0**-14, 2.0**-24, 2.0**-25, 3 * 2.0**-26, 1 + 2.0**-8),
        *(1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 3.3895314e38, 3.3961775e38),
        *(127 * 2.0**-126, 126.99999 * 2.0**-126, 127.0, 0.5, 1.5, 2.5, math.inf, math.nan),
    ],
    np.float32,
)
CORNERS = np.concatenate([CORNERS, -CORNERS])
COUNTS = st.integers(1, 600)  # Up to two blocks and a part of one.
ANY_BITS = arrays.arrays(np.uint32, COUNTS, elements=st.integers(0, 2**32 - 1)).map(
    lambda bits: bits.view(np.float32)
)
CORNER_CASES = arrays.arrays(np.float32, COUNTS, elements=st.sampled_from(CORNERS.tolist()))
FINITE = arrays.arrays(
    np.float32, COUNTS, elements=st.floats(-1e6, 1e6, width=32), fill=st.just(np.float32(0.25))
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Converter:
    """One implementation of the encodings."""

    encode: Callable[[Encoding.ValueType, Floats], bytes]
    decode: Callable[[Encoding.ValueType, bytes, int], Floats]


def _numpy_encode(encoding: Encoding.ValueType, values: Floats) -> bytes:
    data = np.empty(encoded_bytes(encoding, len(values)), np.uint8)
    with_numpy.CODECS[encoding]().encode(values, data)
    return data.tobytes()


def _numpy_decode(encoding: Encoding.ValueType, data: bytes, count: int) -> Floats:
    values = np.empty(count, np.float32)
    with_numpy.CODECS[encoding]().decode(np.frombuffer(data, np.uint8), values)
    return values


def _torch_codec(encoding: Encoding.ValueType) -> with_torch.Codec:
    return with_torch.CODECS[CoreEncoding(Encoding.Name(encoding).removeprefix("ENCODING_"))]


def _torch_encode(encoding: Encoding.ValueType, values: Floats) -> bytes:
    data = torch.empty(encoded_bytes(encoding, len(values)), dtype=torch.uint8)
    _torch_codec(encoding).encode(torch.from_numpy(values.copy()), data)
    return bytes(data.numpy())


def _torch_decode(encoding: Encoding.ValueType, data: bytes, count: int) -> Floats:
    values = torch.empty(count)
    _torch_codec(encoding).decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), values)
    found: Floats = values.numpy()
    return found


NUMPY = Converter(encode=_numpy_encode, decode=_numpy_decode)
TORCH = Converter(encode=_torch_encode, decode=_torch_decode)
CONVERTERS = [pytest.param(NUMPY, id="numpy"), pytest.param(TORCH, id="torch")]


def _blocks_in_words(values: Floats) -> bytes:
    """Encode as the contract says it, one element at a time."""
    data = b""
    for begin in range(0, len(values), 256):
        block = values[begin : begin + 256]
        largest = np.float32(max(abs(block), default=0)) if np.isfinite(block).all() else None
        scale = np.float32(np.nan) if largest is None else largest / np.float32(127)
        with np.errstate(over="ignore"):
            if not np.isfinite(scale * np.float32(127)):
                data += struct.pack("<I", 0x7FC00000) + bytes(len(block))
                continue
        if scale < 2.0**-126:
            data += bytes(4 + len(block))
            continue
        # Python's round() takes ties to even.
        codes = [round(float(np.float32(each / scale))) for each in block]
        data += struct.pack(f"<f{len(block)}b", scale, *codes)
    return data


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(values=ANY_BITS | CORNER_CASES | FINITE)
@example(values=CORNERS)
def test_numpy_and_torch_make_the_same_bytes(encoding: Encoding.ValueType, values: Floats) -> None:
    data = NUMPY.encode(encoding, values)
    assert data == TORCH.encode(encoding, values)
    _assert_same(
        NUMPY.decode(encoding, data, len(values)), TORCH.decode(encoding, data, len(values))
    )


@given(values=ANY_BITS | CORNER_CASES | FINITE)
@example(values=CORNERS)
def test_blocks_are_what_the_contract_says_of_them(values: Floats) -> None:
    assert NUMPY.encode(INT8_BLOCKS, values) == _blocks_in_words(values)


@given(values=ANY_BITS | CORNER_CASES | FINITE)
def test_halves_are_what_torch_rounds_to(values: Floats) -> None:
    for encoding, dtype, nan in ((BF16, torch.bfloat16, 0x7FC0), (FP16, torch.float16, 0x7E00)):
        rounded = torch.from_numpy(values.copy()).to(dtype).view(torch.int16).numpy()
        expected = np.where(np.isnan(values), np.int16(nan), rounded)
        assert NUMPY.encode(encoding, values) == expected.tobytes()


@pytest.mark.parametrize("converter", CONVERTERS)
@given(values=FINITE | CORNER_CASES)
def test_errors_are_within_what_is_stated(converter: Converter, values: Floats) -> None:
    exact = values.astype(np.float64)

    def error_of(encoding: Encoding.ValueType) -> NDArray[np.float64]:
        decoded = converter.decode(encoding, converter.encode(encoding, values), len(values))
        return np.abs(decoded.astype(np.float64) - exact)

    with np.errstate(invalid="ignore"):  # Infinity less infinity, which no bound holds for.
        magnitude = np.abs(exact)
        bf16, fp16, blocks = (error_of(encoding) for encoding in (BF16, FP16, INT8_BLOCKS))
    fits = magnitude < 3.3895e38
    assert np.all(bf16[fits] <= np.maximum(magnitude[fits] * 2.0**-8, 2.0**-134))
    fits = magnitude < 65504
    assert np.all(fp16[fits] <= np.maximum(magnitude[fits] * 2.0**-11, 2.0**-25))
    for begin in range(0, len(values), 256):
        block = magnitude[begin : begin + 256]
        if block.max() < 3e38:
            half_a_scale = block.max() / 127 / 2
            bound = max(half_a_scale * (1 + 2.0**-15), 127 * 2.0**-126)
            assert np.all(blocks[begin : begin + 256] <= bound)


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(
    values=ANY_BITS | FINITE,
    limits=st.lists(st.integers(1, 300), min_size=1),
    cuts=st.lists(st.integers(1, 300), min_size=1),
)
def test_bytes_may_be_cut_anywhere(
    encoding: Encoding.ValueType, values: Floats, limits: list[int], cuts: list[int]
) -> None:
    data = bytearray()
    source = EncodingSource(encoding, len(values), _encoder(encoding, values))
    limit = _forever(limits)
    while len(data) < source.byte_count:
        most = next(limit)
        read = source.read(len(data), most)
        assert 0 < len(read) <= most
        data += read
    assert bytes(data) == NUMPY.encode(encoding, values)

    decoded = np.empty_like(values)
    target = DecodingTarget(encoding, len(values), _decoder(encoding, decoded))
    assert target.byte_count == source.byte_count
    offset, cut = 0, _forever(cuts)
    while offset < len(data):
        piece = memoryview(data)[offset : offset + next(cut)]
        target.write(offset, piece)
        offset += len(piece)
    _assert_same(decoded, NUMPY.decode(encoding, bytes(data), len(values)))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_tensor_of_many_pieces_is_what_it_is_in_one(encoding: Encoding.ValueType) -> None:
    values = np.random.default_rng(3).standard_normal(9 * PIECE_ELEMENTS + 77, dtype=np.float32)
    source = EncodingSource(encoding, len(values), _encoder(encoding, values))
    data = bytearray()
    while len(data) < source.byte_count:
        read = source.read(len(data), 1 << 20)
        assert len(read) > (1 << 20) - 260 or len(data) + len(read) == source.byte_count
        data += read
    halves = torch.from_numpy(values)
    if encoding == BF16:
        assert data == halves.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    if encoding == FP16:
        assert data == halves.to(torch.float16).view(torch.uint8).numpy().tobytes()
    decoded = np.empty_like(values)
    DecodingTarget(encoding, len(values), _decoder(encoding, decoded)).write(0, memoryview(data))
    assert np.abs(decoded - values).max() < 0.025  # Of 127 steps to five standard deviations.


def test_nothing_is_no_bytes() -> None:
    for encoding in (BF16, FP16, INT8_BLOCKS):
        assert EncodingSource(encoding, 0, _encoder(encoding, CORNERS)).byte_count == 0
    assert [encoded_bytes(INT8_BLOCKS, count) for count in (1, 256, 257)] == [5, 260, 265]
    assert encoded_bytes(BF16, 3) == 6


def _encoder(
    encoding: Encoding.ValueType, values: Floats
) -> Callable[[int, int, memoryview], None]:
    codec = with_numpy.CODECS[encoding]()

    def encode(first: int, last: int, data: memoryview) -> None:
        codec.encode(values[first:last], np.frombuffer(data, np.uint8))

    return encode


def _decoder(
    encoding: Encoding.ValueType, values: Floats
) -> Callable[[int, int, memoryview], None]:
    codec = with_numpy.CODECS[encoding]()

    def decode(first: int, last: int, data: memoryview) -> None:
        codec.decode(np.frombuffer(data, np.uint8), values[first:last])

    return decode


def _assert_same(one: Floats, other: Floats) -> None:
    """Compare bits; any NaN is as good as any other."""
    numbers = ~np.isnan(one)
    assert np.array_equal(numbers, ~np.isnan(other))
    assert np.array_equal(one[numbers].view(np.uint32), other[numbers].view(np.uint32))


def _forever(numbers: list[int]) -> Iterator[int]:
    while True:
        yield from numbers
