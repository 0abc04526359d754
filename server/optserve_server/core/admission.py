"""Admission: memory is reserved before it is taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from optserve_server.core.errors import LimitExceededError, MemoryExhaustedError
from optserve_server.core.events import Observer
from optserve_server.core.limits import Limits
from optserve_server.core.optimizers import OPTIMIZERS, rehearse
from optserve_server.core.spec import DurabilityMode, Encoding, GroupSpec, SessionSpec, Wire
from optserve_server.core.tensors import TensorSpec

# Objects of torch and Python, which tiny tensors consist of. A test measures them.
_PARAMETER_OVERHEAD_BYTES = 6144  # Around a parameter: 1.5 KiB; around its state: up to 3.6.
TENSOR_OVERHEAD_BYTES = 3072
"""Around a tensor that is received or sent: itself 0.6 KiB, views of its bytes 1.7, its name."""
# What torch holds at a time beside parameters, gradients and state: so many tensors of the largest
# one's size, or, if it treats all of a group together, of all of them. A test measures it.
_TEMPORARIES_OF_ONE = 4
_TEMPORARIES_OF_ALL = 3
_NORM_ITEM_BYTES = 4  # The norm of 16-bit floats is that of a copy in 32 bits.
_EVALUATION_COPIES = 4  # What came, and what torch computes between it and the gradient.
_CLASSES_OF_ROW_BYTES = 16  # For the accuracy: the predicted class and the right one, as INT64.
_RETRY_AFTER_S = (
    5.0  # Sessions end when people end them; asking more often than this does not help.
)


def session_bytes(spec: SessionSpec, device: torch.device) -> int:
    """Return how much memory a session takes at most.

    Parameters, optimizer state, gradients, torch's temporaries, and the weights of its loss. On
    CUDA this is the device's; of pinned memory, for parameters and gradients, it takes less.

    Raises:
        InvalidHyperparameterError: torch does not take the hyperparameters of a group.
    """
    kind = OPTIMIZERS[spec.optimizer.kind]
    total = temporary_bytes = 0
    # Each worker's must be kept until all are there.
    gradients = spec.workers + keeps_private_gradients(spec, device)
    for group in spec.groups:
        parameters = [spec.parameters[i] for i in group.parameters]
        state_bytes = {
            dtype: rehearse(kind, dtype, device, group.hyperparameters)
            for dtype in {parameter.dtype for parameter in parameters}
        }
        for parameter in parameters:
            total += parameter.byte_count * (1 + gradients)
            if spec.wire.parameters is Encoding.INT8_BLOCKS:
                # What each worker has, to send it the differences.
                total += parameter.byte_count * spec.workers
            total += parameter.element_count * state_bytes[parameter.dtype]
            total += _PARAMETER_OVERHEAD_BYTES + TENSOR_OVERHEAD_BYTES * gradients
        temporary_bytes = max(temporary_bytes, _temporary_bytes(group, parameters, device))
    return total + temporary_bytes + _loss_bytes(spec)


def keeps_private_gradients(spec: SessionSpec, device: torch.device) -> bool:
    """Return whether a session copies gradients that a client shares with it, before a step.

    What is written to a journal must be what is applied, whatever the client writes meanwhile. On
    CUDA both are of the copy on the device.
    """
    journals = spec.durability.mode is DurabilityMode.JOURNAL
    return journals and device.type == "cpu" and spec.wire == Wire()


def transfer_bytes(specs: Sequence[TensorSpec]) -> int:
    """Return how much memory tensors take that are being received."""
    return sum(spec.byte_count + TENSOR_OVERHEAD_BYTES for spec in specs)


def walked_bytes(spec: TensorSpec) -> int:
    """Return how many bytes torch walks along a tensor, and allocates beside it.

    A dimension of zero leaves no bytes, but torch still goes along the others.
    """
    return math.prod(max(size, 1) for size in spec.shape) * spec.dtype.itemsize


def evaluation_bytes(predictions: TensorSpec, targets: TensorSpec) -> int:
    """Return how much memory an evaluation takes at most: what comes, and what is answered, too."""
    count = walked_bytes(predictions) + walked_bytes(targets)
    rows = math.prod(max(size, 1) for size in (*predictions.shape[:1], *predictions.shape[2:]))
    return _EVALUATION_COPIES * count + _CLASSES_OF_ROW_BYTES * rows


def _loss_bytes(spec: SessionSpec) -> int:
    """Return how much memory the weights of a loss take: in the spec, and on the device."""
    values = spec.loss.arguments.values() if spec.loss else ()
    return 2 * sum(value.nbytes for value in values if isinstance(value, Tensor))


def _temporary_bytes(
    group: GroupSpec, parameters: Sequence[TensorSpec], device: torch.device
) -> int:
    """Return how much memory a step of a group takes for a while."""
    norms = [each.element_count for each in parameters if each.dtype.itemsize < _NORM_ITEM_BYTES]
    norm_bytes = max(norms, default=0) * _NORM_ITEM_BYTES
    if group.hyperparameters.get("fused"):
        return norm_bytes
    sizes = [parameter.byte_count for parameter in parameters]
    together = group.hyperparameters.get("foreach", device.type == "cuda")
    update_bytes = (
        _TEMPORARIES_OF_ALL * sum(sizes) if together else _TEMPORARIES_OF_ONE * max(sizes)
    )
    return max(norm_bytes, update_bytes)


class Spare:
    """Memory that is reserved and lies idle, for one to have at a time."""

    def __init__(self) -> None:
        self._lent = False

    @contextmanager
    def lent(self, *, idle: bool) -> Iterator[bool]:
        """Have it for a block, if it lies idle and nobody has it; yields whether that is so."""
        lends = idle and not self._lent
        self._lent |= lends
        try:
            yield lends
        finally:
            self._lent &= not lends


class Budget:
    """How much memory is promised to whom."""

    def __init__(self, limits: Limits, observer: Observer) -> None:
        """Give out at most ``limits.memory_bytes_max``."""
        self._limits = limits
        self._observer = observer
        self.reserved_bytes = 0

    def reserve(self, count: int, *, what: str, field: str) -> None:
        """Promise memory, until release().

        Args:
            count: Bytes.
            what: What it is for: "the session".
            field: Path of the field that asks for it, for errors.

        Raises:
            MemoryExhaustedError: There is not that much left.
        """
        free = self._limits.memory_bytes_max - self.reserved_bytes
        if count > free:
            raise MemoryExhaustedError(
                f"{what} needs {count} bytes; {free} of {self._limits.memory_bytes_max} are free;"
                " delete sessions that are done, or try again later",
                field=field,
                expected=f"at most {free} bytes",
                actual=f"{count} bytes",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._set(self.reserved_bytes + count)

    def release(self, count: int) -> None:
        """Give back what was promised."""
        self._set(self.reserved_bytes - count)

    def check_session(self, count: int, *, field: str) -> None:
        """Make sure that no session is larger than allowed; ``field`` as in reserve().

        Raises:
            LimitExceededError: It is.
        """
        if count > self._limits.session_bytes_max:
            raise LimitExceededError(
                f"the session needs {count} bytes; one may have {self._limits.session_bytes_max}",
                field=field,
                expected=f"at most {self._limits.session_bytes_max} bytes",
                actual=f"{count} bytes",
            )

    def _set(self, reserved_bytes: int) -> None:
        self.reserved_bytes = reserved_bytes
        self._observer.memory_reserved(reserved_bytes)
