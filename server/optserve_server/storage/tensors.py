"""Data types in a journal, where they stand by number."""

from __future__ import annotations

import torch

DTYPES: tuple[tuple[int, torch.dtype], ...] = (
    (1, torch.bool),
    (2, torch.uint8),
    (3, torch.int8),
    (4, torch.int16),
    (5, torch.int32),
    (6, torch.int64),
    (7, torch.float16),
    (8, torch.bfloat16),
    (9, torch.float32),
    (10, torch.float64),
    (11, torch.uint16),
    (12, torch.uint32),
    (13, torch.uint64),
    (14, torch.float8_e4m3fn),
    (15, torch.float8_e5m2),
    (16, torch.complex64),
)
"""Number and type. Numbers stand on disk, and are never used again."""

NUMBERS = {dtype: number for number, dtype in DTYPES}
BY_NUMBER = dict(DTYPES)

DIMENSIONS_MAX = 64  # What torch takes.


def aligned_bytes(byte_count: int) -> torch.Tensor:
    """Return memory for so many bytes, for others to fill, aligned as torch likes it."""
    return torch.empty(byte_count, dtype=torch.uint8)
