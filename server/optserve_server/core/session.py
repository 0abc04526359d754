"""A session: parameters, optimizer, schedule, loss and counters of one model.

Pure of clocks, sockets and threads.

Not safe for concurrent use: SessionActor lets one writer in at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optserve_server.core import optimizers
from optserve_server.core.device import Device
from optserve_server.core.errors import (
    EpochEmptyError,
    EpochOutOfOrderError,
    LossNotSetError,
    NoGradientError,
    NonFiniteGradientError,
    ParametersNotSetError,
    SessionFailedError,
)
from optserve_server.core.history import LossHistory
from optserve_server.core.limits import Limits
from optserve_server.core.losses import LossFunction, LossOutcome
from optserve_server.core.optimizers import OPTIMIZERS
from optserve_server.core.preview import Preview
from optserve_server.core.region import ALIGNMENT, Region
from optserve_server.core.schedulers import Schedule
from optserve_server.core.spec import ScheduleUnit, SessionSpec

_NAMED_MAX = 5  # How many names a message lists.
# Adam on so much takes 0.1 ms on one core, half of it for any size at all.
_SMALL_TENSORS_MAX = 16
_SMALL_ELEMENTS_MAX = 1 << 16
# A large gradient's norm is made of its rows' norms, added up in FP64: the squares of 25 million
# FP32 in one sum missed the norm by 1e-3, and took half as long again.
_NORM_ROW = 1 << 14
_NORM_ROWS_FROM = 1 << 20  # Fewer elements take less time, and lose nothing, in one sum.
# Too narrow for a sum of squares.
_NORM_DTYPES = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What a step did."""

    step: int
    """Number of the step, from 1."""
    epochs: int
    """Epochs that had been ended."""
    rates: Mapping[str, float]
    """Learning rate that the step used, by group."""
    gradient_norm: float
    """Euclidean norm of the gradient that was applied, over all parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionView:
    """Where a session stands between two steps."""

    steps: int
    """How many steps have been applied."""
    epochs: int
    """How many epochs have been ended."""
    rates: Mapping[str, float]
    """Learning rate that the next step will use, by group."""
    ready: bool
    """Whether every parameter has a value."""
    failed: bool
    """Whether a step failed half way."""


def norm_of(gradients: Sequence[Tensor | None]) -> float:
    """Return the Euclidean norm over all gradients, which are contiguous.

    Not finite only if one of them is not, or if it overflows.
    """
    present = [gradient for gradient in gradients if gradient is not None]
    norms = [_norm(gradient) for gradient in _joined(present)]
    if norms and norms[0].is_cuda:  # Where to look at each of them would be to wait for each.
        total: float = torch.linalg.vector_norm(
            torch.stack([each.double() for each in norms])
        ).item()
        return total
    return math.hypot(*(norm.item() for norm in norms))


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
    return [first.as_strided((count,), (1,))] if count >= _NORM_ROWS_FROM else gradients


def _norm(gradient: Tensor) -> Tensor:
    dtype = _NORM_DTYPES.get(gradient.dtype)
    parts = gradient
    if gradient.numel() >= _NORM_ROWS_FROM:
        flat = gradient.view(-1)
        whole = flat.numel() - flat.numel() % _NORM_ROW
        rows = torch.linalg.vector_norm(flat[:whole].view(-1, _NORM_ROW), dim=1, dtype=dtype)
        rest = torch.linalg.vector_norm(flat[whole:], dtype=dtype)
        parts, dtype = torch.cat([rows, rest.view(1)]), torch.float64
    norm: Tensor = torch.linalg.vector_norm(parts, dtype=dtype)
    return norm


def _largest(gradient: Tensor) -> float:
    """Return the largest magnitude; NaN if there is one. Takes no memory, unlike torch.isfinite."""
    return torch.linalg.vector_norm(gradient, math.inf).item() if gradient.numel() else 0.0


class Session:
    """One model being trained."""

    def __init__(self, spec: SessionSpec, device: Device, limits: Limits) -> None:
        """Allocate the parameters, as zeros that do not count as set, and build the rest.

        Raises:
            CallerError: torch does not take the spec.
        """
        self.spec = spec
        self._device = device
        self._parameters = [device.zeros(parameter) for parameter in spec.parameters]
        self._mirrors = [device.mirror(parameter) for parameter in self._parameters]
        self._unset = set(range(len(self._parameters)))
        element_count = sum(each.element_count for each in spec.parameters)
        self.is_small = (  # With all that the workers bring: their mean is part of a step.
            not device.is_cuda
            and spec.workers * len(spec.parameters) <= _SMALL_TENSORS_MAX
            and spec.workers * element_count <= _SMALL_ELEMENTS_MAX
        )
        """Whether a step takes less time than the way to another thread and back: some 0.1 ms."""
        groups = [
            ([self._parameters[i] for i in group.parameters], group.hyperparameters)
            for group in spec.groups
        ]
        self._kind = OPTIMIZERS[spec.optimizer.kind]
        self._optimizer = optimizers.build(self._kind, groups)
        self._schedule = (
            Schedule(spec.scheduler, self._optimizer, limits) if spec.scheduler else None
        )
        self._loss = LossFunction(spec.loss, device.torch) if spec.loss else None
        self.history = LossHistory(spec.loss_points_max)
        self.epochs = 0
        self.last_outcome: StepOutcome | None = None
        self._epoch_steps = 0  # Steps of the epoch that is going on.
        self.failed = False
        self.version = 0
        """One more after each step, and after whatever else has an effect on the next one."""
        self._region: Region | None = None

    @property
    def steps(self) -> int:
        """How many steps have been applied."""
        return self.last_outcome.step if self.last_outcome else 0

    @property
    def rates(self) -> dict[str, float]:
        """Learning rate that the next step will use, by group."""
        groups = zip(self.spec.groups, self._optimizer.param_groups, strict=True)
        return {group.name: float(torch_group["lr"]) for group, torch_group in groups}

    def view(self) -> SessionView:
        """Return where the session stands; not while a step is being applied."""
        return SessionView(
            steps=self.steps,
            epochs=self.epochs,
            rates=self.rates,
            ready=not self._unset,
            failed=self.failed,
        )

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The parameters' values on the CPU, in the spec's order.

        The session's own memory, to be read only; the same list for as long as it is there.
        """
        return self._mirrors

    def share(self) -> Region:
        """Move the parameters' values on the CPU into memory that clients may read.

        Done once, and for good: the session takes no more memory for it, and no longer a step.

        Raises:
            RegionUnavailableError: There is no such memory. Nothing was changed.
        """
        if self._region is None:
            self._region = Region(self.spec.parameters, read_only=True)
            for mirror, shared in zip(self._mirrors, self._region.tensors, strict=True):
                shared.copy_(mirror)
                # The tensor remains the one that the optimizer's state belongs to.
                mirror.data = shared
            self._mirrors = list(self._mirrors)  # Whoever has kept views of them sees the change.
        return self._region

    def check_ready(self) -> None:
        """Make sure that the session can step.

        Raises:
            ParametersNotSetError: A parameter has no value.
            SessionFailedError: A step failed half way.
        """
        if self.failed:
            raise SessionFailedError(
                "an earlier step failed half way; delete the session and create it anew"
            )
        if self._unset:
            names = [self.spec.parameters[i].name for i in sorted(self._unset)]
            shown = ", ".join(names[:_NAMED_MAX]) + (", ..." if len(names) > _NAMED_MAX else "")
            raise ParametersNotSetError(
                f"{len(names)} of {len(self._parameters)} parameters have no value: {shown};"
                " send them with UploadParameters",
                field="parameters",
                expected="a value for every parameter",
                actual=f"none for {shown}",
            )

    def set_parameters(self, values: Mapping[int, Tensor]) -> None:
        """Copy values, by position, into the parameters; shapes and dtypes are theirs."""
        for position, value in values.items():
            self._parameters[position].copy_(value)
            self._mirrors[position].copy_(value)
        self._unset -= values.keys()
        self.version += 1

    def check_finite(self, gradients: Sequence[Tensor | None], norm: float) -> None:
        """Make sure that no gradient holds a NaN or an infinity, unless the session allows it.

        Args:
            gradients: One for each parameter, or None where there is none.
            norm: Their norm, which tells in nearly every case.

        Raises:
            NonFiniteGradientError: One does.
        """
        if self.spec.allow_non_finite or math.isfinite(norm):
            return
        # The norm may only have overflowed: look at each of them.
        for position, gradient in enumerate(gradients):
            if gradient is not None and not math.isfinite(_largest(gradient)):
                name = self.spec.parameters[position].name
                raise NonFiniteGradientError(
                    f"the gradient of {name!r} holds a NaN or an infinity;"
                    " the step was not applied",
                    field=f"gradients[{name!r}]",
                    expected="finite numbers",
                    actual="NaN or infinity",
                )

    def step(self, gradients: Sequence[Tensor | None]) -> StepOutcome:
        """Apply one optimizer step, then advance the schedule if it counts steps.

        Args:
            gradients: One for each parameter, on the device, of its shape and dtype; None where
                there is none. Consumed: the buffers may be overwritten.

        Returns:
            What the step did.

        Raises:
            SessionStateError: The session cannot step, or its schedule has come to its end. Nothing
                was changed.
            NoGradientError: There is not one gradient. Nothing was changed.
            NonFiniteGradientError: A gradient holds a NaN or an infinity. Nothing was changed.
        """
        self.check_ready()
        if all(gradient is None for gradient in gradients):
            raise NoGradientError(
                "no worker brought a gradient to the step", field="gradients", expected="a gradient"
            )
        norm = norm_of(gradients)
        self.check_finite(gradients, norm)
        advances = self._schedule if self.spec.schedule_unit is ScheduleUnit.STEPS else None
        if advances:
            advances.check_next()
        outcome = StepOutcome(
            step=self.steps + 1, epochs=self.epochs, rates=self.rates, gradient_norm=norm
        )
        self.version += 1
        try:
            self._apply(gradients)
            if advances:
                advances.advance()
        except BaseException:
            self.failed = True  # What torch leaves half done is not to be trusted.
            raise
        self.last_outcome = outcome
        self._epoch_steps += 1
        return outcome

    def preview(self) -> Preview:
        """Return what computes the next step's parameters ahead of it."""
        return Preview(self, self._parameters, self._optimizer, self._kind, self._device)

    def forget(self) -> None:
        """Let the tensors' memory go; there will be no more steps, and nobody to read them."""
        self._parameters, self._mirrors, self._region = [], [], None
        self._optimizer.state.clear()
        for group in self._optimizer.param_groups:
            group["params"] = []

    def end_epoch(self, epoch: int) -> None:
        """End an epoch: advance the schedule if it counts epochs.

        Repeating the last one changes nothing.

        Args:
            epoch: Number of the epoch that ends, from 1.

        Raises:
            EpochOutOfOrderError: It is another epoch's turn.
            EpochEmptyError: The epoch has no step.
            ScheduleFailedError: The schedule has come to its end.
        """
        if epoch == self.epochs and epoch > 0:
            return
        if epoch != self.epochs + 1:
            raise EpochOutOfOrderError(
                f"epoch {epoch} cannot end; the next one to end is {self.epochs + 1}",
                field="epoch",
                expected=self.epochs + 1,
                actual=epoch,
            )
        if not self._epoch_steps:
            raise EpochEmptyError(f"epoch {epoch} has no step yet", field="epoch")
        if self._schedule and self.spec.schedule_unit is ScheduleUnit.EPOCHS:
            self._schedule.check_next()
            self._schedule.advance()
        self.epochs = epoch
        self._epoch_steps = 0
        self.version += 1

    def change(self, spec: SessionSpec, rates_set: Sequence[bool]) -> None:
        """Change what may change while the session runs.

        Args:
            spec: What is to be in force. Differs from the present spec in hyperparameters, loss,
                policy and name only; rehearsed by the caller.
            rates_set: For each group, whether its ``lr`` is what the next step shall use.

        Raises:
            CallerError: torch does not take the loss. Nothing was changed.
        """
        if spec.loss is not self.spec.loss:
            self._loss = LossFunction(spec.loss, self._device.torch) if spec.loss else None
        torch_groups = self._optimizer.param_groups
        for position, (group, rate_set) in enumerate(zip(spec.groups, rates_set, strict=True)):
            values = dict(group.hyperparameters)
            rate: float = values.pop("lr")  # type: ignore[assignment]
            torch_groups[position].update(values)
            if rate_set and self._schedule:
                self._schedule.rebase(position, rate)
            elif rate_set:
                torch_groups[position]["lr"] = rate
        self.spec = spec
        self.version += 1

    def evaluate(self, predictions: Tensor, targets: Tensor, *, with_gradient: bool) -> LossOutcome:
        """Compute the loss; changes nothing. See LossFunction.evaluate.

        Raises:
            LossNotSetError: The session has no loss.
        """
        if self._loss is None:
            raise LossNotSetError(
                "the session has no loss; set one with UpdateSession", field="loss"
            )
        return self._loss.evaluate(predictions, targets, with_gradient=with_gradient)

    def _apply(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self._kind.step(self._optimizer)
        for parameter, mirror in zip(self._parameters, self._mirrors, strict=True):
            parameter.grad = None
            if mirror is not parameter:
                mirror.copy_(parameter, non_blocking=True)
        self._device.synchronize()
