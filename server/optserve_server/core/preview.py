"""What parameters will be after a step, computed ahead of it, piece by piece.

A step that waits for its last gradient before it begins to answer uses a link in one direction at a
time. A preview computes what a step will make of some elements as soon as their gradients are
there, in memory of its own. The session stays as it is: there is nothing to roll back if the step
is given up or refused, and the step itself, once all gradients have come, computes the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from optserve_server.core.device import Device
from optserve_server.core.optimizers import OptimizerKind

# 1 MiB of FP32: small enough that a piece, its gradient and its state stay in cache together, and
# large enough that the way to a thread is no matter.
PIECE_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some consecutive elements of a parameter."""

    position: int
    """Of the parameter among the session's."""
    first: int
    last: int
    """One more than the number of the last element."""

    @property
    def element_count(self) -> int:
        """How many elements they are."""
        return self.last - self.first


def cut(position: int, parameter: Tensor, *, fused: bool) -> list[Piece] | None:
    """Return the pieces of a parameter, in order; None if it cannot be had in pieces.

    torch's fused kernels treat units of 64 bytes alike, and only what is left at the very end one
    by one, which may round differently. PIECE_ELEMENTS is a multiple of such units, so that cutting
    changes no bit. Other kernels promise nothing of the kind, and get whole tensors.
    """
    count = parameter.numel()
    if fused or count <= PIECE_ELEMENTS:
        return [
            Piece(position=position, first=first, last=min(first + PIECE_ELEMENTS, count))
            for first in range(0, count, PIECE_ELEMENTS)
        ]
    return None


class Previewed(Protocol):
    """The session, as far as a preview looks at it."""

    version: int
    """One more after each step, and after whatever else has an effect on the next one."""


class Preview:
    """Computes the next step's parameters. Void as soon as the session changes."""

    def __init__(
        self,
        session: Previewed,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        kind: OptimizerKind,
        device: Device,
    ) -> None:
        """Look ahead of the step that ``optimizer``, of ``kind``, will make of ``parameters``."""
        self._session = session
        self._version = session.version
        self._parameters = parameters
        self._kind = kind
        self._device = device
        self._state: Mapping[Tensor, Mapping[str, Any]] = optimizer.state
        groups: list[dict[str, Any]] = [{**each, "params": []} for each in optimizer.param_groups]
        arguments = {name: groups[0][name] for name in kind.defaults if name in groups[0]}
        self._optimizer = kind.torch_class(groups, **arguments)
        positions = {id(parameter): i for i, parameter in enumerate(parameters)}
        self._groups = {
            positions[id(parameter)]: number
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        self.pieces = [
            cut(i, each, fused=bool(groups[self._groups[i]].get("fused")))
            for i, each in enumerate(parameters)
        ]
        """Of each parameter; None for one that cannot be had in pieces."""

    @property
    def is_void(self) -> bool:
        """Whether the session has changed since, so that the step will do something else."""
        return self._session.version != self._version

    @property
    def came_true(self) -> bool:
        """Whether the session has made exactly the step that was looked ahead of."""
        return self._session.version == self._version + 1

    def compute(self, pieces: Iterable[tuple[Piece, Tensor]]) -> list[Tensor]:
        """Return what the elements of each piece will be: flat tensors of their own, on the CPU.

        Args:
            pieces: Each with the whole gradient of its parameter, on the CPU; only the piece's
                elements are looked at.
        """
        values = []
        for piece, gradient in pieces:
            parameter = self._parameters[piece.position]
            group = self._optimizer.param_groups[self._groups[piece.position]]
            value = _copy(parameter, parameter, piece)
            loaded = self._device.load(_part(gradient, parameter, piece))
            # Other kernels than fused ones may calculate in the gradient's own memory.
            value.grad = loaded if group.get("fused") else loaded.clone()
            group["params"].append(value)
            self._optimizer.state[value] = {
                name: _copy(entry, parameter, piece) if isinstance(entry, Tensor) else entry
                for name, entry in self._state.get(parameter, {}).items()
            }
            values.append(value)
        try:
            self._kind.step(self._optimizer)
        finally:
            self._optimizer.state.clear()
            for group in self._optimizer.param_groups:
                group["params"] = []
        return [value.detach().view(-1).cpu() for value in values]


def _part(tensor: Tensor, parameter: Tensor, piece: Piece) -> Tensor:
    """Return what belongs to a piece: its elements, or all of a tensor that has others.

    A whole tensor keeps its shape: torch counts steps in tensors that have none.
    """
    if tensor.shape != parameter.shape or piece.element_count == parameter.numel():
        return tensor
    return tensor.view(-1)[piece.first : piece.last]


def _copy(tensor: Tensor, parameter: Tensor, piece: Piece) -> Tensor:
    return _part(tensor, parameter, piece).clone()
