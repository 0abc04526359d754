"""Tensors of scenarios: JSON to torch and back, bit by bit."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Json = dict[str, Any]

STORED_BYTES_MAX = 4096  # What is larger is a pattern going in, and a checksum coming out.

_DTYPES = {
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "FP32": torch.float32,
    "FP64": torch.float64,
    "INT64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def given(
    shape: Sequence[int],
    seed: int,
    *,
    name: str = "",
    data_type: str = "FP32",
    modulo: int = 251,
    subtract: int = 125,
    divide: int = 64,
) -> Json:
    """Return a tensor of well-mixed values that every floating point type holds exactly.

    Args:
        shape: Of the tensor.
        seed: Of the values.
        name: Of the tensor; left out where it is empty.
        data_type: Of the tensor.
        modulo: How many different values there are at most.
        subtract: What is taken from each, before the division.
        divide: A power of two.
    """
    pattern = {
        "multiply": 97,
        "add": 31 * seed,
        "modulo": modulo,
        "subtract": subtract,
        "divide": divide,
    }
    header = header_of(shape, name=name, data_type=data_type)
    values = to_torch(header | {"pattern": pattern})
    if values.nbytes > STORED_BYTES_MAX:
        return header | {"pattern": pattern}
    return to_json(values, name)


def header_of(shape: Sequence[int], *, name: str = "", data_type: str = "FP32") -> Json:
    """Return a tensor without its value."""
    return ({"name": name} if name else {}) | {"data_type": data_type, "shape": list(shape)}


def of(values: Any, *, name: str = "", data_type: str = "FP32") -> Json:  # noqa: ANN401 - nested lists of numbers.
    """Return a tensor with just these values."""
    return to_json(torch.tensor(values, dtype=_DTYPES[data_type]), name)


def to_torch(tensor: Json) -> Tensor:
    """Make a torch tensor of what a scenario says."""
    dtype, shape = _DTYPES[tensor["data_type"]], tensor["shape"]
    if pattern := tensor.get("pattern"):
        i = torch.arange(math.prod(shape), dtype=torch.int64)
        mixed = (i * pattern["multiply"] + pattern["add"]) % pattern["modulo"] - pattern["subtract"]
        values: Tensor = mixed.double() / pattern["divide"]
        if not torch.equal(values.to(dtype).double(), values):
            raise ValueError(f"{tensor['data_type']} does not hold the pattern exactly")
        return values.to(dtype).reshape(shape)
    data = bytearray(base64.b64decode(tensor["data"]))
    elements = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return elements.reshape(shape)


def to_json(tensor: Tensor, name: str = "") -> Json:
    """Write a torch tensor down: its bytes, or their checksum if it is large."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    value = (
        {"sha256": hashlib.sha256(data).hexdigest()}
        if len(data) > STORED_BYTES_MAX
        else {"data": base64.b64encode(data).decode()}
    )
    return header_of(tensor.shape, name=name, data_type=_NAMES[tensor.dtype]) | value
