"""A session: parameters, optimizer, schedule, loss and counters of one model.

Pure of clocks, sockets and threads. Not safe for concurrent use: SessionActor lets one writer in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from optserve_server.core import optimizers
from optserve_server.core.changes import (
    Change,
    EpochChange,
    ParametersChange,
    PointChange,
    SpecChange,
    StepChange,
)
from optserve_server.core.device import Device
from optserve_server.core.errors import (
    EpochEmptyError,
    EpochOutOfOrderError,
    LossNotSetError,
    NoGradientError,
    ParametersNotSetError,
    SessionFailedError,
)
from optserve_server.core.history import LossHistory, LossPoint
from optserve_server.core.limits import Limits
from optserve_server.core.losses import LossFunction, LossOutcome
from optserve_server.core.norms import check_finite, norm_of
from optserve_server.core.optimizers import OPTIMIZERS
from optserve_server.core.outcome import SessionView, StepOutcome
from optserve_server.core.preview import Cuts, Preview
from optserve_server.core.region import Region
from optserve_server.core.schedulers import Schedule
from optserve_server.core.spec import ScheduleUnit, SessionSpec
from optserve_server.core.state import SessionState

_NAMED_MAX = 5  # How many names a message lists.
_EXPRESSIONS_ONCE = {"expression_chars_max": 4096, "expression_nodes_max": 512}

Recorder: TypeAlias = Callable[[Change, int], None]
"""Writes a change down, and its number, after all checks and before it is made.

What it raises refuses the change, and nothing was changed.
"""


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
        self.sequence = 0
        """Number of the last change, from 1: those that a journal would hold."""
        self.recorder: Recorder | None = None
        self._region: Region | None = None
        self._cuts: Cuts | None = None

    @classmethod
    def restored(cls, state: SessionState, device: Device, limits: Limits) -> Session:
        """Return the session that a state was taken from; the state's tensors become its own.

        Raises:
            CallerError: torch does not take the spec.
            ValueError: The state is none of such a session.
        """
        # What was within the limits once goes on, whatever they are now.
        session = cls(state.spec, device, dataclasses.replace(limits, **_EXPRESSIONS_ONCE))
        session.set_parameters(state.parameters)
        optimizers.restore(session._optimizer, state.optimizer_state, state.optimizer_groups)
        if session._schedule and state.schedule is not None:
            session._schedule.restore(state.schedule, stepped=state.last_outcome is not None)
        session.history.restore(state.history)
        session.epochs, session._epoch_steps = state.epochs, state.epoch_steps
        session.last_outcome = state.last_outcome
        session.sequence = state.sequence
        return session

    def capture(self, *, copy: bool = True) -> SessionState:
        """Return everything that the session is; not while a step is being applied.

        Args:
            copy: Whether the tensors are copies. If not, what is on the CPU is the session's own.

        Raises:
            SessionFailedError: A step failed half way.
        """
        self._check_whole()
        kept, groups = optimizers.capture(self._optimizer, copy=copy)
        return SessionState(
            spec=self.spec,
            sequence=self.sequence,
            parameters={
                position: mirror.clone() if copy else mirror
                for position, mirror in enumerate(self._mirrors)
                if position not in self._unset
            },
            optimizer_state=kept,
            optimizer_groups=groups,
            schedule=self._schedule.capture() if self._schedule else None,
            epochs=self.epochs,
            epoch_steps=self._epoch_steps,
            last_outcome=self.last_outcome,
            history=self.history.capture(),
        )

    @property
    def byte_count(self) -> int:
        """How many bytes its tensors have: what a copy of them takes."""
        kept = (value for values in self._optimizer.state.values() for value in values.values())
        tensors = [*self._mirrors, *(value for value in kept if isinstance(value, Tensor))]
        return sum(tensor.nbytes for tensor in tensors)

    def load(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the CPU on the session's device: itself if it is there."""
        return self._device.load(tensor)

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
            self._mirrors, self._cuts = list(self._mirrors), None  # Views keep the old memory.
        return self._region

    @property
    def is_shared(self) -> bool:
        """Whether clients may read the parameters' values without asking."""
        return self._region is not None

    def check_ready(self) -> None:
        """Make sure that the session can step.

        Raises:
            ParametersNotSetError: A parameter has no value.
            SessionFailedError: A step failed half way.
        """
        self._check_whole()
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
        self._record(ParametersChange(values=values))
        for position, value in values.items():
            self._parameters[position].copy_(value)
            self._mirrors[position].copy_(value)
        self._unset -= values.keys()
        self.version += 1

    def step(
        self,
        gradients: Sequence[Tensor | None],
        digests: Sequence[bytes] | None = None,
        norm: float | None = None,
        decided: Callable[[StepOutcome], None] | None = None,
    ) -> StepOutcome:
        """Apply one optimizer step, then advance the schedule if it counts steps.

        Args:
            gradients: One for each parameter, on the device, of its shape and dtype; None where
                there is none. Consumed: the buffers may be overwritten.
            digests: What identifies the content that each worker brought. None: no worker said.
            norm: The gradients' norm, if it is known.
            decided: Told what the step will do, once nothing can refuse it any more.

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
        norm = norm_of(gradients) if norm is None else norm
        check_finite(self.spec, gradients, norm)
        advances = self._schedule if self.spec.schedule_unit is ScheduleUnit.STEPS else None
        if advances:
            advances.check_next()
        outcome = StepOutcome(
            step=self.steps + 1,
            epochs=self.epochs,
            rates=self.rates,
            gradient_norm=norm,
            digests=digests or (b"",) * self.spec.workers,
        )
        self._record(StepChange(outcome=outcome, gradients=gradients))
        self.version += 1
        if decided:
            decided(outcome)
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
        self._cuts = self._cuts or Cuts(self._parameters, self._optimizer)
        return Preview(self, self._cuts, self._kind, self._device)

    def forget(self) -> None:
        """Let the tensors' memory go; there will be no more steps, and nobody to read them."""
        self._parameters, self._mirrors, self._region, self._cuts = [], [], None, None
        self._optimizer.state.clear()
        for group in self._optimizer.param_groups:
            group["params"] = []

    def end_epoch(self, epoch: int) -> None:
        """End an epoch: advance the schedule if it counts epochs.

        Repeating the last one changes nothing.

        Args:
            epoch: Number of the epoch that ends, from 1.

        Raises:
            SessionFailedError: The session has failed: of the last one, too, nobody knows.
            EpochOutOfOrderError, EpochEmptyError: It is another one's turn, or has no step.
            ScheduleFailedError: The schedule has come to its end.
        """
        self._check_whole()
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
        self._record(EpochChange(epoch=epoch))
        if self._schedule and self.spec.schedule_unit is ScheduleUnit.EPOCHS:
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
            CallerError: torch does not take the loss, or the schedule a rate. Nothing was changed.
        """
        loss = self._loss
        if spec.loss is not self.spec.loss:
            loss = LossFunction(spec.loss, self._device.torch) if spec.loss else None
        for position, (group, rate_set) in enumerate(zip(spec.groups, rates_set, strict=True)):
            if rate_set and self._schedule:
                self._schedule.check_rebase(position, group.hyperparameters["lr"])  # type: ignore[arg-type]
        self._record(SpecChange(spec=spec, rates_set=rates_set))
        torch_groups = self._optimizer.param_groups
        for position, (group, rate_set) in enumerate(zip(spec.groups, rates_set, strict=True)):
            values = dict(group.hyperparameters)
            rate: float = values.pop("lr")  # type: ignore[assignment]
            torch_groups[position].update(values)
            if rate_set and self._schedule:
                self._schedule.rebase(position, rate)
            elif rate_set:
                torch_groups[position]["lr"] = rate
        self.spec, self._loss, self._cuts = spec, loss, None  # Cut as ``fused`` was.
        self.version += 1

    def add_point(self, point: LossPoint) -> None:
        """Keep a point of the history, whose number is the next one."""
        self._record(PointChange(point=point))
        self.history.put(point)

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

    def _check_whole(self) -> None:
        if self.failed:
            raise SessionFailedError(
                "an earlier step failed half way; delete the session and create it anew"
            )

    def _record(self, change: Change) -> None:
        """Give a number to a change that is about to be made; have it written down if asked."""
        if self.recorder is not None:
            self.recorder(change, self.sequence + 1)
        self.sequence += 1

    def _apply(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self._kind.step(self._optimizer)
        for parameter in self._parameters:
            parameter.grad = None
        self._device.unload(self._parameters, self._mirrors)
