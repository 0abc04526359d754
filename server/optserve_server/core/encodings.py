"""Encodings of FP32 elements with torch: what tensor.proto says of each, piece by piece.

Elements are flat FP32 tensors on the CPU; their bytes are flat tensors of uint8. Each function
takes at least one element, and of blocks no more than fit into the processor's cache with what is
made of them on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optserve_server.core.spec import Encoding

_BLOCK_ELEMENTS = 256
_SCALE_BYTES = 4
_BLOCK_BYTES = _SCALE_BYTES + _BLOCK_ELEMENTS
_CODE_MAX = 127
_SCALE_MIN = 2.0**-126  # The smallest normal number: below it a quotient is no code.
# Added and taken away again, it leaves the nearest integer, ties to even, for there FP32 has no
# room for fractions. torch's round() is the same, but given to several threads however small it is.
_ROUND = 3 * 2.0**22
# The canonical NaNs, as numbers of int16.
_BF16_NAN = 0x7FC0
_FP16_NAN = 0x7E00


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """An encoding's elements to bytes and back."""

    encode: Callable[[Tensor, Tensor], None]
    """Given elements and the memory for their bytes."""
    decode: Callable[[Tensor, Tensor], None]
    """Given bytes and the memory for their elements."""


def _encode_bf16(values: Tensor, data: Tensor) -> None:
    data.view(torch.bfloat16).copy_(values)
    _set_nan(values, data, _BF16_NAN)


def _decode_bf16(data: Tensor, values: Tensor) -> None:
    values.copy_(data.view(torch.bfloat16))


def _encode_fp16(values: Tensor, data: Tensor) -> None:
    data.view(torch.float16).copy_(values)
    _set_nan(values, data, _FP16_NAN)


def _decode_fp16(data: Tensor, values: Tensor) -> None:
    values.copy_(data.view(torch.float16))


def _set_nan(values: Tensor, halves: Tensor, bits: int) -> None:
    """Make every NaN the same: torch's differ between its vector units and its scalar code."""
    if math.isnan(values.max()):
        halves.view(torch.int16)[values.isnan()] = bits


def _encode_int8_blocks(values: Tensor, data: Tensor) -> None:
    """Scale each block so that its largest magnitude becomes 127, and round."""
    for blocks, encoded in _blocks(values, data):
        quotients = blocks.abs()
        scales = quotients.amax(dim=1, keepdim=True).div_(_CODE_MAX)
        finite = (scales * _CODE_MAX).isfinite()
        # Divided by infinity, every finite element becomes code 0.
        divisors = torch.where(scales >= _SCALE_MIN, scales, math.inf)
        torch.div(blocks, divisors, out=quotients).add_(_ROUND).sub_(_ROUND)
        scales.masked_fill_(scales < _SCALE_MIN, 0)
        if not finite.all():
            scales.masked_fill_(~finite, math.nan)
            quotients.masked_fill_(~finite, 0)
        encoded[:, :_SCALE_BYTES] = scales.view(torch.uint8)
        encoded[:, _SCALE_BYTES:].view(torch.int8).copy_(quotients)


def _decode_int8_blocks(data: Tensor, values: Tensor) -> None:
    """Multiply the codes of each block by its scale."""
    for blocks, encoded in _blocks(values, data):
        scales = encoded[:, :_SCALE_BYTES].clone(memory_format=torch.contiguous_format)
        codes = encoded[:, _SCALE_BYTES:].view(torch.int8)
        torch.mul(codes, scales.view(torch.float32), out=blocks)


def _blocks(values: Tensor, data: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return views of elements and bytes with a row for each block; the last one may be shorter."""
    whole, rest = divmod(values.numel(), _BLOCK_ELEMENTS)
    count, size = whole * _BLOCK_ELEMENTS, whole * _BLOCK_BYTES
    views = [(values[:count].view(whole, -1), data[:size].view(whole, -1))] if whole else []
    return [*views, (values[count:].view(1, -1), data[size:].view(1, -1))] if rest else views


def encode_differences(values: Tensor, reference: Tensor, data: Tensor) -> bool:
    """Encode what must be added to ``reference`` in INT8_BLOCKS, and add what the bytes say.

    So what is rounded away now is part of the next difference.

    Args:
        values: What the reference shall become, as nearly as may be.
        reference: What the receiver has; afterwards, what it has then.
        data: Memory for the bytes.

    Returns:
        Whether the reference is finite: a NaN in it would stay there for ever.
    """
    differences = values - reference
    _encode_int8_blocks(differences, data)
    _decode_int8_blocks(data, differences)
    reference.add_(differences)
    return not math.isnan(reference.max())


CODECS: Mapping[Encoding, Codec] = {
    Encoding.BF16: Codec(encode=_encode_bf16, decode=_decode_bf16),
    Encoding.FP16: Codec(encode=_encode_fp16, decode=_decode_fp16),
    Encoding.INT8_BLOCKS: Codec(encode=_encode_int8_blocks, decode=_decode_int8_blocks),
}
"""What converts for each encoding but PLAIN."""
