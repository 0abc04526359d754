"""The safetensors format: https://github.com/huggingface/safetensors, readable in any language.

Written here piece by piece, with no copy of the tensors, to whatever takes them: a disk, or a
client. The library takes a path, or makes one string of everything. Tests hold it to the library.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from optserve_server.core.storage import DamagedError
from optserve_server.core.tensors import byte_view

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
"""Data types by the format's names."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = struct.Struct("<Q")
_HEADER_ALIGNMENT = 8  # What the format asks for, padded with spaces.


def encode_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> list[memoryview | bytes]:
    """Return the file's bytes as pieces to be written one behind the other; tensors are views.

    Larger elements come first, so that each tensor is aligned to its own.

    Args:
        tensors: By name; contiguous, on the CPU.
        metadata: Texts to stand in the header, for readers other than decode_tensors().
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return [_LENGTH.pack(len(text)) + text, *(byte_view(tensor) for _, tensor in ordered)]


def decode_tensors(
    path: str, byte_count: int, read: Callable[[memoryview], object]
) -> dict[str, Tensor]:
    """Return the tensors of a file, each in memory of its own; the file is nowhere as a whole.

    Args:
        path: Of the file, for errors.
        byte_count: Its size.
        read: Fills what it is given with the file's next bytes.

    Raises:
        DamagedError: It is no such file, or not one that encode_tensors() has written.
    """
    length = 0
    if byte_count >= _LENGTH.size:
        (length,) = _LENGTH.unpack(_next(_LENGTH.size, read))
    begin = _LENGTH.size + length
    if begin > byte_count:
        raise DamagedError(path, 0, "it ends in its header")
    try:
        header = json.loads(_next(length, read))
    except (ValueError, RecursionError):
        raise DamagedError(path, _LENGTH.size, "the header is no JSON") from None
    if not isinstance(header, dict):
        raise DamagedError(path, _LENGTH.size, "the header is no object")
    tensors = {}
    left = byte_count - begin
    for name, entry in header.items():
        try:
            tensor = _tensor(entry, byte_count - begin - left, left)
        except (KeyError, OverflowError, RuntimeError, TypeError, ValueError):
            raise DamagedError(path, _LENGTH.size, f"tensor {name!r} is none") from None
        read(byte_view(tensor))
        left -= tensor.nbytes
        tensors[name] = tensor
    if left:
        raise DamagedError(path, byte_count - left, "there is more than the tensors")
    return tensors


def _next(count: int, read: Callable[[memoryview], object]) -> bytearray:
    data = bytearray(count)
    read(memoryview(data))
    return data


def _tensor(entry: Any, begin: int, left: int) -> Tensor:  # noqa: ANN401 It is what JSON gave.
    """Return memory for a tensor that begins at ``begin`` and has at most ``left`` bytes."""
    dtype = DTYPES[entry["dtype"]]
    shape = tuple(int(each) for each in entry["shape"])
    size = math.prod(shape) * dtype.itemsize
    offsets = [begin, begin + size]
    if entry["data_offsets"] != offsets or min(shape, default=0) < 0 or size > left:
        raise ValueError(offsets)
    return torch.empty(shape, dtype=dtype)
