"""What parameters will be after a step, computed ahead of it, piece by piece.

A step that waits for its last gradient before it begins to answer uses a link in one direction at a
time. A preview computes what a step will make of some elements as soon as their gradients are
there, in memory of its own. The session stays as it is: there is nothing to roll back if the step
is given up or refused, and the step itself, once all gradients have come, computes the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from optserve_server.core.device import Device
from optserve_server.core.norms import row_norms, total_norm
from optserve_server.core.optimizers import OptimizerKind

# 1 MiB of FP32: small enough that a piece, its gradient and its state stay in cache together, and
# large enough that the way to a thread is no matter.
PIECE_ELEMENTS = 1 << 18

_Views: TypeAlias = dict[tuple[int, str], Sequence[Tensor]]


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


class Cuts:
    """A session's parameters in pieces: views, made once for all steps.

    A call of torch lets others have the interpreter, and a thread that computes waits for it again
    each time: on a busy server that takes longer than to compute.
    """

    def __init__(self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Cut the parameters of an optimizer, which are contiguous."""
        self.parameters = parameters
        self.optimizer = optimizer
        positions = {id(parameter): i for i, parameter in enumerate(parameters)}
        self.groups = {
            positions[id(parameter)]: number
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        """Number of each parameter's group, by position."""
        self.fused = all(group.get("fused") for group in optimizer.param_groups)
        """Whether fused kernels step all of them."""
        self.pieces = [
            cut(i, each, fused=bool(optimizer.param_groups[self.groups[i]].get("fused")))
            for i, each in enumerate(parameters)
        ]
        """Of each parameter; None for one that cannot be had in pieces."""
        self.views: _Views = {}
        """Of what stays as long as the session does."""

    def of(self, piece: Piece, name: str, tensor: Tensor, views: _Views) -> Tensor:
        """Return a piece of a tensor that has the shape of the piece's parameter.

        Args:
            piece: Which one.
            name: Of the tensor, among those of the parameter.
            tensor: Contiguous.
            views: Where views of it are kept, and its memory with them.

        Returns:
            A flat view; of a tensor without dimensions, itself: torch counts steps in such.
        """
        if piece.element_count == tensor.numel():
            return tensor if tensor.ndim < 2 else tensor.view(-1)
        parts = views.get((piece.position, name))
        if parts is None or parts[0].data_ptr() != tensor.data_ptr():  # It may have been moved.
            sizes = [each.element_count for each in self.pieces[piece.position] or ()]
            parts = views[piece.position, name] = tensor.view(-1).split_with_sizes(sizes)
        return parts[piece.first // PIECE_ELEMENTS]


class Previewed(Protocol):
    """The session, as far as a preview looks at it."""

    version: int
    """One more after each step, and after whatever else has an effect on the next one."""


class Preview:
    """Computes the next step's parameters. Void as soon as the session changes."""

    def __init__(self, session: Previewed, cuts: Cuts, kind: OptimizerKind, device: Device) -> None:
        """Look ahead of the step that the optimizer of ``cuts``, of ``kind``, will make."""
        self._session = session
        self._version = session.version
        self._cuts = cuts
        self._kind = kind
        self._device = device
        given = cuts.optimizer.param_groups
        groups: list[dict[str, Any]] = [{**each, "params": []} for each in given]
        arguments = {name: groups[0][name] for name in kind.defaults if name in groups[0]}
        self._optimizer = kind.torch_class(groups, **arguments)
        self._row_norms: dict[Piece, list[float]] = {}
        self._views: _Views = {}  # Of gradients, whose memory goes while nobody brings any.
        self.pieces = cuts.pieces
        """Of each parameter; None for one that cannot be had in pieces."""

    @property
    def is_void(self) -> bool:
        """Whether the session has changed since, so that the step will do something else."""
        return self._session.version != self._version

    @property
    def came_true(self) -> bool:
        """Whether the session has made exactly the step that was looked ahead of."""
        return self._session.version == self._version + 1

    @property
    def norm(self) -> float | None:
        """What norm_of() says of the gradients; None if not all of them have been looked at."""
        norms: list[float] = []
        for pieces in self.pieces:
            if pieces is None or not all(piece in self._row_norms for piece in pieces):
                return None
            norms += (value for piece in pieces for value in self._row_norms[piece])
        return total_norm(norms)

    def compute(self, pieces: Sequence[tuple[Piece, Tensor]]) -> list[Tensor]:
        """Return what the elements of each piece will be: flat tensors, on the CPU.

        They share memory with each other, and with nothing else.

        Args:
            pieces: Each with the whole gradient of its parameter, on the CPU; only the piece's
                elements are looked at.
        """
        with self.beside_others():
            return self._compute(pieces)

    def beside_others(self) -> AbstractContextManager[None]:
        """Keep to one core for a block: for a second one there is work beside it, moving bytes.

        Kernels that are not fused may give other bits on one, and keep theirs.
        """
        return one_thread() if self._cuts.fused else nullcontext()

    def _compute(self, pieces: Sequence[tuple[Piece, Tensor]]) -> list[Tensor]:
        cuts = self._cuts
        parameters = [cuts.parameters[piece.position] for piece, _ in pieces]
        states = [cuts.optimizer.state.get(each, {}) for each in parameters]
        values = _copies(
            [
                cuts.of(piece, "", parameter, cuts.views)
                for (piece, _), parameter in zip(pieces, parameters, strict=True)
            ]
        )
        entries = iter(
            _copies(
                [
                    cuts.of(piece, name, entry, cuts.views)
                    if entry.shape == parameter.shape
                    else entry
                    for (piece, _), parameter, state in zip(pieces, parameters, states, strict=True)
                    for name, entry in state.items()
                    if isinstance(entry, Tensor)
                ]
            )
        )
        for (piece, gradient), value, state in zip(pieces, values, states, strict=True):
            group = self._optimizer.param_groups[cuts.groups[piece.position]]
            part = cuts.of(piece, "gradient", gradient, self._views)
            if not self._device.is_cuda:  # There it is the norm of what is on the device.
                self._row_norms[piece] = row_norms(part)
            loaded = self._device.load(part)
            # Other kernels than fused ones may calculate in the gradient's own memory.
            value.grad = loaded if group.get("fused") else loaded.clone()
            group["params"].append(value)
            self._optimizer.state[value] = {
                name: next(entries) if isinstance(entry, Tensor) else entry
                for name, entry in state.items()
            }
        try:
            self._kind.step(self._optimizer)
        finally:
            self._optimizer.state.clear()
            for group in self._optimizer.param_groups:
                group["params"] = []
        return [value.view(-1).cpu() for value in values]


def _copies(originals: list[Tensor]) -> list[Tensor]:
    """Return copies of tensors that have one dimension or none, with few calls of torch."""
    # By device too: beside CUDA, kernels that are not fused count their steps on the CPU.
    alike: dict[tuple[torch.dtype, torch.device, int], list[int]] = {}
    for i, each in enumerate(originals):
        alike.setdefault((each.dtype, each.device, each.ndim), []).append(i)
    copies = list(originals)
    for (dtype, device, dimensions), numbers in alike.items():
        sizes = [originals[i].numel() for i in numbers]
        memory = torch.empty(sum(sizes), dtype=dtype, device=device)
        parts = memory.split_with_sizes(sizes) if dimensions else memory.unbind()
        for i, part in zip(numbers, parts, strict=True):
            copies[i] = part
    if copies:
        torch._foreach_copy_(copies, originals)
    return copies


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch calculate in this thread alone for a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
