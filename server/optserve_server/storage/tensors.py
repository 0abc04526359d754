"""Data types on disk: by number in a journal, by safetensors' names in a snapshot."""

from __future__ import annotations

import torch

DTYPES: tuple[tuple[int, str, torch.dtype], ...] = (
    (1, "BOOL", torch.bool),
    (2, "U8", torch.uint8),
    (3, "I8", torch.int8),
    (4, "I16", torch.int16),
    (5, "I32", torch.int32),
    (6, "I64", torch.int64),
    (7, "F16", torch.float16),
    (8, "BF16", torch.bfloat16),
    (9, "F32", torch.float32),
    (10, "F64", torch.float64),
    (11, "U16", torch.uint16),
    (12, "U32", torch.uint32),
    (13, "U64", torch.uint64),
    (14, "F8_E4M3", torch.float8_e4m3fn),
    (15, "F8_E5M2", torch.float8_e5m2),
    (16, "C64", torch.complex64),
)
"""Number, name and type. Numbers stand on disk, and are never used again."""

NUMBERS = {dtype: number for number, _, dtype in DTYPES}
BY_NUMBER = {number: dtype for number, _, dtype in DTYPES}
NAMES = {dtype: name for _, name, dtype in DTYPES}
BY_NAME = {name: dtype for _, name, dtype in DTYPES}

DIMENSIONS_MAX = 64  # What torch takes.
ELEMENTS_MAX = (
    1 << 62
)  # More than any disk has; the product of a shape's numbers must fit in 63 bits.


def aligned_bytes(byte_count: int) -> torch.Tensor:
    """Return memory for so many bytes, for others to fill, aligned as torch likes it."""
    return torch.empty(byte_count, dtype=torch.uint8)
