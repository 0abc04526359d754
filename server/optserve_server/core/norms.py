"""The norm of gradients, and what it tells of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from optserve_server.core.errors import NonFiniteGradientError
from optserve_server.core.region import ALIGNMENT
from optserve_server.core.spec import SessionSpec

ROW_ELEMENTS = 1 << 14
"""A gradient's norm is made of its rows' norms, added up in FP64.

The squares of 25 million FP32 in one sum missed the norm by 1e-3, and took half as long again. A
row is too short to be given to several threads, which would round otherwise.
"""
_JOINED_FROM = 1 << 20  # Fewer elements gain nothing.
# Too narrow for a sum of squares.
_NORM_DTYPES = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def norm_of(gradients: Sequence[Tensor | None]) -> float:
    """Return the Euclidean norm over all gradients, which are contiguous.

    Not finite only if one of them is not, or if it overflows.
    """
    joined = _joined([gradient for gradient in gradients if gradient is not None])
    if joined and joined[0].is_cuda:  # Where to look at each norm would be to wait for each.
        norms = [norm.double().view(-1) for each in joined for norm in _row_norms(each)]
        total: float = torch.linalg.vector_norm(torch.cat(norms)).item()
        return total
    return total_norm(value for each in joined for value in row_norms(each))


def row_norms(part: Tensor) -> list[float]:
    """Return the norms of which norm_of() makes the whole one, in order.

    Args:
        part: Of a gradient, on the CPU: all of it, or, flat, some whole rows of it.
    """
    return [value for norm in _row_norms(part) for value in norm.view(-1).tolist()]


def total_norm(norms: Iterable[float]) -> float:
    """Return the norm that norm_of() would, given the rows' norms of all gradients, in order."""
    return math.hypot(*norms)


def check_finite(spec: SessionSpec, gradients: Sequence[Tensor | None], norm: float) -> None:
    """Make sure that no gradient holds a NaN or an infinity, unless the session allows it.

    Args:
        spec: The session's.
        gradients: One for each parameter, or None where there is none.
        norm: Their norm, which tells in nearly every case.

    Raises:
        NonFiniteGradientError: One does.
    """
    if spec.allow_non_finite or math.isfinite(norm):
        return
    # The norm may only have overflowed: look at each of them.
    for position, gradient in enumerate(gradients):
        if gradient is not None and not math.isfinite(_largest(gradient)):
            name = spec.parameters[position].name
            raise NonFiniteGradientError(
                f"the gradient of {name!r} holds a NaN or an infinity; the step was not applied",
                field=f"gradients[{name!r}]",
                expected="finite numbers",
                actual="NaN or infinity",
            )


def _joined(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return all of them as one where they lie side by side in one Region; else as they are.

    What lies between them is zeros, which add nothing. 161 tensors of 25 million elements take
    2 ms longer than one.
    """
    if len(gradients) < 2 or gradients[0].dtype in _NORM_DTYPES:  # Those take a copy: of one, then.
        return gradients
    first = gradients[0]
    memory, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for gradient in gradients:
        gap = gradient.data_ptr() - end
        same = gradient.dtype is first.dtype and gradient.untyped_storage().data_ptr() == memory
        if not (same and 0 <= gap < ALIGNMENT):
            return gradients
        end += gap + gradient.nbytes
    count = (end - first.data_ptr()) // first.itemsize
    return [first.as_strided((count,), (1,))] if count >= _JOINED_FROM else gradients


def _row_norms(gradient: Tensor) -> list[Tensor]:
    """Return the norms of all whole rows, and the norm of what is left."""
    dtype = _NORM_DTYPES.get(gradient.dtype)
    whole = gradient.numel() - gradient.numel() % ROW_ELEMENTS
    if not whole:
        return [torch.linalg.vector_norm(gradient, dtype=dtype)]
    flat = gradient.view(-1)
    norms = [torch.linalg.vector_norm(flat[:whole].view(-1, ROW_ELEMENTS), dim=1, dtype=dtype)]
    if whole < flat.numel():
        norms.append(torch.linalg.vector_norm(flat[whole:], dtype=dtype))
    return norms


def _largest(gradient: Tensor) -> float:
    """Return the largest magnitude; NaN if there is one. Takes no memory, unlike torch.isfinite."""
    return torch.linalg.vector_norm(gradient, math.inf).item() if gradient.numel() else 0.0
