"""The core's values into messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from torch import Tensor

from optserve.limits import MESSAGE_HEADROOM_BYTES
from optserve.v1 import (
    loss_pb2,
    optimizer_pb2,
    optimizer_service_pb2,
    scheduler_pb2,
    session_pb2,
    tensor_pb2,
)
from optserve_server.core import losses
from optserve_server.core.actor import SessionActor
from optserve_server.core.errors import LimitExceededError
from optserve_server.core.history import LossPoint
from optserve_server.core.limits import Limits
from optserve_server.core.losses import LossOutcome
from optserve_server.core.outcome import StepOutcome
from optserve_server.core.round import LastContribution
from optserve_server.core.spec import (
    Choice,
    DurabilityMode,
    ScheduleUnit,
    SessionSpec,
    Split,
    Value,
)
from optserve_server.core.standing import Listed, State
from optserve_server.core.tensors import TensorSpec, byte_view, dtype_name, spec_of
from optserve_server.rpc.constraints import kind_of
from optserve_server.rpc.encoded import ENCODINGS

_Oneof = TypeVar("_Oneof", optimizer_pb2.Optimizer, scheduler_pb2.Scheduler, loss_pb2.Loss)

SPLITS: Mapping[Split, session_pb2.Split.ValueType] = {
    Split.NONE: session_pb2.SPLIT_UNSPECIFIED,
    Split.TRAIN: session_pb2.SPLIT_TRAIN,
    Split.VALIDATION: session_pb2.SPLIT_VALIDATION,
}
_DURABILITY_MODES: Mapping[DurabilityMode, session_pb2.DurabilityMode.ValueType] = {
    DurabilityMode.NONE: session_pb2.DURABILITY_MODE_NONE,
    DurabilityMode.SNAPSHOT: session_pb2.DURABILITY_MODE_SNAPSHOT,
    DurabilityMode.JOURNAL: session_pb2.DURABILITY_MODE_JOURNAL,
}
_STATES: Mapping[State, session_pb2.SessionState.ValueType] = {
    State.AWAITING_PARAMETERS: session_pb2.SESSION_STATE_AWAITING_PARAMETERS,
    State.READY: session_pb2.SESSION_STATE_READY,
    State.FAILED: session_pb2.SESSION_STATE_FAILED,
    State.PARKED: session_pb2.SESSION_STATE_PARKED,
    State.DAMAGED: session_pb2.SESSION_STATE_DAMAGED,
}
_UNITS: Mapping[ScheduleUnit, scheduler_pb2.ScheduleUnit.ValueType] = {
    ScheduleUnit.STEPS: scheduler_pb2.SCHEDULE_UNIT_STEPS,
    ScheduleUnit.EPOCHS: scheduler_pb2.SCHEDULE_UNIT_EPOCHS,
}


def session(actor: SessionActor) -> session_pb2.Session:
    """Encode a session in full."""
    return session_pb2.Session(status=session_status(actor), spec=session_spec(actor.spec))


def session_status(session: Listed) -> session_pb2.SessionStatus:
    """Encode where a session stands."""
    standing = session.standing()
    return session_pb2.SessionStatus(
        session_id=standing.session_id,
        display_name=standing.display_name,
        state=_STATES[standing.state],
        steps=standing.steps,
        epochs=standing.epochs,
        rates=group_rates(standing.rates),
        optimizer=standing.optimizer,
        workers=standing.workers,
        parameter_count=standing.parameter_count,
        reserved_bytes=standing.reserved_bytes,
        device=standing.device,
        create_time=timestamp(standing.created_s),
        step_time=None if standing.stepped_s is None else timestamp(standing.stepped_s),
        durable_steps=standing.durable_steps,
    )


def session_spec(spec: SessionSpec) -> session_pb2.SessionSpec:
    """Encode what is in force for a session."""
    scheduler = choice(scheduler_pb2.Scheduler(), spec.scheduler) if spec.scheduler else None
    if scheduler is not None:
        scheduler.unit = _UNITS[spec.schedule_unit]
    policy = (
        session_pb2.NON_FINITE_POLICY_ALLOW
        if spec.allow_non_finite
        else session_pb2.NON_FINITE_POLICY_REFUSE
    )
    return session_pb2.SessionSpec(
        display_name=spec.display_name,
        parameters=[tensor_header(parameter) for parameter in spec.parameters],
        optimizer=choice(optimizer_pb2.Optimizer(), spec.optimizer),
        groups=[
            session_pb2.ParameterGroup(
                name=group.name,
                parameters=[spec.parameters[i].name for i in group.parameters],
                overrides=choice(
                    optimizer_pb2.Optimizer(),
                    Choice(kind=spec.optimizer.kind, arguments=group.hyperparameters),
                ),
            )
            for group in spec.groups
        ],
        scheduler=scheduler,
        loss=_loss(spec.loss) if spec.loss else None,
        workers=spec.workers,
        non_finite=policy,
        limits=session_pb2.SessionLimits(
            loss_points_max=spec.loss_points_max, round_timeout_s=spec.round_timeout_s
        ),
        wire=session_pb2.Wire(
            gradients=ENCODINGS[spec.wire.gradients], parameters=ENCODINGS[spec.wire.parameters]
        ),
        durability=session_pb2.Durability(
            mode=_DURABILITY_MODES[spec.durability.mode],
            snapshot_steps=spec.durability.snapshot_steps,
            snapshot_s=spec.durability.snapshot_s,
            fsync=spec.durability.fsync,
        ),
    )


def check_fits(spec: SessionSpec, limits: Limits, field: str) -> None:
    """Make sure that a session can be answered with in one message: it names a parameter twice.

    Raises:
        LimitExceededError: It cannot.
    """
    count, most = session_spec(spec).ByteSize(), limits.message_bytes_max - MESSAGE_HEADROOM_BYTES
    if count > most:
        raise LimitExceededError(
            f"the session's spec has {count} bytes as a message; {most} are allowed:"
            " use fewer parameters, shorter names, or a smaller weight",
            field=field,
            expected=f"at most {most} bytes",
            actual=f"{count} bytes",
        )


def choice(message: _Oneof, chosen: Choice) -> _Oneof:
    """Fill a oneof with an optimizer, scheduler or loss and its arguments, by its descriptor.

    Return it.
    """
    fields = message.DESCRIPTOR.oneofs_by_name["kind"].fields
    for field in fields:
        if kind_of(field).name == chosen.kind:
            arguments: Message = getattr(message, field.name)
            arguments.SetInParent()
            _fill(arguments, chosen.arguments)
    return message


def group_rates(rates: Mapping[str, float]) -> list[session_pb2.GroupRate]:
    """Encode learning rates by group."""
    return [session_pb2.GroupRate(group=group, lr=lr) for group, lr in rates.items()]


def tensor_header(spec: TensorSpec) -> tensor_pb2.TensorHeader:
    """Encode what a tensor is."""
    data_type = tensor_pb2.DataType.Value(f"DATA_TYPE_{dtype_name(spec.dtype)}")
    return tensor_pb2.TensorHeader(name=spec.name, data_type=data_type, shape=spec.shape)


def tensor(name: str, value: Tensor) -> tensor_pb2.Tensor:
    """Encode a whole tensor; contiguous, on the CPU."""
    return tensor_pb2.Tensor(
        header=tensor_header(spec_of(name, value)), data=bytes(byte_view(value))
    )


def step_result(outcome: StepOutcome, *, replayed: bool) -> optimizer_service_pb2.StepResult:
    """Encode what a step did; `parameters` are the caller's to add."""
    return optimizer_service_pb2.StepResult(
        step=outcome.step,
        epochs=outcome.epochs,
        rates=group_rates(outcome.rates),
        gradient_norm=outcome.gradient_norm,
        replayed=replayed,
    )


def contribution(last: LastContribution) -> optimizer_service_pb2.Contribution:
    """Encode the last step that a worker has contributed to."""
    return optimizer_service_pb2.Contribution(
        step=last.step, digest=last.digest, applied=last.outcome is not None
    )


def contribution_response(
    actor: SessionActor, last: LastContribution | None
) -> optimizer_service_pb2.GetContributionResponse:
    """Encode what became of a worker's last step, and where the session stands."""
    outcome = last.outcome if last else None
    return optimizer_service_pb2.GetContributionResponse(
        contribution=contribution(last) if last else None,
        result=step_result(outcome, replayed=True) if outcome else None,
        status=session_status(actor),
    )


def loss_result(outcome: LossOutcome, steps: int) -> optimizer_service_pb2.LossResult:
    """Encode what an evaluation found."""
    return optimizer_service_pb2.LossResult(
        loss=outcome.loss, accuracy=outcome.accuracy, steps=steps
    )


def loss_point(point: LossPoint) -> session_pb2.LossPoint:
    """Encode one point of a history."""
    return session_pb2.LossPoint(
        sequence=point.sequence,
        split=SPLITS[point.split],
        steps=point.steps,
        epochs=point.epochs,
        loss=point.loss,
        accuracy=point.accuracy,
        time=timestamp(point.time_s),
    )


def timestamp(time_s: float) -> Timestamp:
    """Encode seconds since the epoch."""
    message = Timestamp()
    message.FromNanoseconds(round(time_s * 1e9))
    return message


def _loss(chosen: Choice) -> loss_pb2.Loss:
    effective = Choice(kind=chosen.kind, arguments=losses.effective_arguments(chosen))
    return choice(loss_pb2.Loss(), effective)


def _fill(message: Message, arguments: Mapping[str, Value]) -> None:
    for field in message.DESCRIPTOR.fields:
        value = arguments.get(field.name)
        if value is None:
            continue
        if isinstance(value, tuple):
            getattr(message, field.name).extend(value)
        elif isinstance(value, Tensor):
            getattr(message, field.name).CopyFrom(tensor("", value.cpu()))
        elif field.enum_type is not None:
            number = loss_pb2.Reduction.Value(f"REDUCTION_{str(value).upper()}")
            setattr(message, field.name, number)
        else:
            setattr(message, field.name, value)
