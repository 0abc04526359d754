"""Encodings, as a session alone would have them: plain torch, a whole tensor at a time."""

from __future__ import annotations

import torch
from tensors import Json
from torch import Tensor

_BLOCK_ELEMENTS = 256
_HALVES = {"BF16": torch.bfloat16, "FP16": torch.float16}


def rounded(encoding: str | None, values: Tensor) -> Tensor:
    """Return what comes of finite values that travel in an encoding."""
    if encoding is None:
        return values
    if encoding in _HALVES:
        return values.to(_HALVES[encoding]).float()
    blocks = [_rounded_block(block) for block in torch.split(values.flatten(), _BLOCK_ELEMENTS)]
    return torch.cat(blocks).reshape(values.shape)


def _rounded_block(block: Tensor) -> Tensor:
    if not block.numel():
        return block
    scale = block.abs().max() / 127
    if scale < 2.0**-126:
        return torch.zeros_like(block)
    return (block / scale).round() * scale


class Wire:
    """What the wire does to a session's gradients and parameters."""

    def __init__(self, spec: Json) -> None:
        """Begin with ``spec``, of SessionSpec.wire."""
        self._gradients: str | None = spec.get("gradients")
        self._parameters: str | None = spec.get("parameters")
        self._lost: dict[tuple[int, str], Tensor] = {}
        self._sent: dict[int, dict[str, Tensor]] = {}

    def open(self, worker: int) -> None:
        """Begin a stream: its worker has nothing yet."""
        self._sent.pop(worker, None)

    def gradient(self, worker: int, name: str, gradient: Tensor) -> Tensor:
        """Return what comes of a worker's gradient."""
        if self._gradients != "INT8_BLOCKS":
            return rounded(self._gradients, gradient)
        whole = gradient + self._lost.get((worker, name), torch.zeros(()))
        came = rounded(self._gradients, whole)
        self._lost[worker, name] = whole - came
        return came

    def parameters(self, worker: int, via: str, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what a worker has of the parameters after a step."""
        if self._parameters != "INT8_BLOCKS":
            return {name: rounded(self._parameters, each) for name, each in parameters.items()}
        if via == "unary":
            return parameters
        before = self._sent.get(worker)
        self._sent[worker] = {
            name: before[name] + rounded("INT8_BLOCKS", each - before[name])
            if before
            else each.clone()
            for name, each in parameters.items()
        }
        return self._sent[worker]
