"""Tensors as the core sees them: a name, a data type, a shape, and a flat view of the bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from optserve_server.core.errors import DataTypeMismatchError, ShapeMismatchError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "FP32": torch.float32,
    "FP64": torch.float64,
    "BF16": torch.bfloat16,
}
"""Data types by their names in the Open Inference Protocol."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a data type: ``FP32``."""
    return _NAMES[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """What a tensor is, before there is one."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def element_count(self) -> int:
        """Number of elements; exact for any shape."""
        return math.prod(self.shape)

    @property
    def byte_count(self) -> int:
        """Number of bytes; exact for any shape."""
        return self.element_count * self.dtype.itemsize


def byte_view(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor: a flat, writable view of its memory."""
    view: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return view


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """Return what ``tensor`` is."""
    return TensorSpec(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))


def check_fits(came: TensorSpec, parameter: TensorSpec, field: str) -> None:
    """Make sure that what came for a parameter is of its data type and shape.

    Raises:
        DataTypeMismatchError, ShapeMismatchError: It is not; ``field`` is the path of its header.
    """
    if came.dtype != parameter.dtype:
        raise DataTypeMismatchError(
            f"{came.name!r} came as {dtype_name(came.dtype)};"
            f" its parameter is {dtype_name(parameter.dtype)}",
            field=f"{field}.data_type",
            expected=dtype_name(parameter.dtype),
            actual=dtype_name(came.dtype),
        )
    if came.shape != parameter.shape:
        raise ShapeMismatchError(
            f"{came.name!r} came with shape {came.shape}; its parameter has {parameter.shape}",
            field=f"{field}.shape",
            expected=parameter.shape,
            actual=came.shape,
        )
