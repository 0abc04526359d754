"""A session's spec: messages into what the core builds a session from, every default filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from torch import Tensor

from optserve.v1 import loss_pb2, optimizer_pb2, scheduler_pb2, session_pb2, tensor_pb2
from optserve_server.core.errors import (
    InvalidFieldError,
    LimitExceededError,
    MissingFieldError,
    UnknownNameError,
    within,
)
from optserve_server.core.limits import Limits
from optserve_server.core.resolve import GroupRequest, SpecRequest, resolve
from optserve_server.core.spec import (
    Choice,
    Durability,
    DurabilityMode,
    Encoding,
    ScheduleUnit,
    SessionSpec,
    Value,
    Wire,
)
from optserve_server.core.tensors import check_fits
from optserve_server.rpc import decode
from optserve_server.rpc.constraints import check_count, check_number
from optserve_server.rpc.encoded import ENCODINGS

_NUMBERS = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_INT64)
_UNITS: Mapping[int, ScheduleUnit] = {
    scheduler_pb2.SCHEDULE_UNIT_UNSPECIFIED: ScheduleUnit.STEPS,
    scheduler_pb2.SCHEDULE_UNIT_STEPS: ScheduleUnit.STEPS,
    scheduler_pb2.SCHEDULE_UNIT_EPOCHS: ScheduleUnit.EPOCHS,
}
_DURABILITY_MODES: Mapping[int, DurabilityMode] = {
    session_pb2.DURABILITY_MODE_UNSPECIFIED: DurabilityMode.NONE,
    session_pb2.DURABILITY_MODE_NONE: DurabilityMode.NONE,
    session_pb2.DURABILITY_MODE_SNAPSHOT: DurabilityMode.SNAPSHOT,
    session_pb2.DURABILITY_MODE_JOURNAL: DurabilityMode.JOURNAL,
}
_ENCODINGS: Mapping[int, Encoding] = {number: encoding for encoding, number in ENCODINGS.items()}


def session_spec(message: session_pb2.SessionSpec, limits: Limits) -> SessionSpec:
    """Decode what a session is to be made from, and fill in every default.

    Raises:
        OptserveError: Something in it is not allowed; ``field`` says what.
    """
    if not message.HasField("optimizer"):
        raise MissingFieldError(
            "a session needs an optimizer", field="spec.optimizer", expected="an optimizer"
        )
    optimizer = choice(message.optimizer, "spec.optimizer", limits)
    own = message.limits
    request = SpecRequest(
        display_name=decode.display_name(message.display_name, limits, "spec.display_name"),
        parameters=decode.tensor_specs(message.parameters, limits, "spec.parameters"),
        optimizer=optimizer,
        groups=[
            _group(each, optimizer.kind, f"spec.groups[{i}]", limits)
            for i, each in enumerate(message.groups)
        ],
        scheduler=choice(message.scheduler, "spec.scheduler", limits)
        if message.HasField("scheduler")
        else None,
        scheduler_field=f"scheduler.{message.scheduler.WhichOneof('kind')}",
        schedule_unit=decode.enum(_UNITS, message.scheduler.unit, "spec.scheduler.unit"),
        loss=choice(message.loss, "spec.loss", limits) if message.HasField("loss") else None,
        workers=message.workers,
        allow_non_finite=bool(decode.non_finite(message.non_finite, "spec.non_finite")),
        loss_points_max=own.loss_points_max if own.HasField("loss_points_max") else None,
        round_timeout_s=own.round_timeout_s if own.HasField("round_timeout_s") else None,
        wire=Wire(
            gradients=decode.enum(_ENCODINGS, message.wire.gradients, "spec.wire.gradients"),
            parameters=decode.enum(_ENCODINGS, message.wire.parameters, "spec.wire.parameters"),
        ),
        durability=Durability(
            mode=decode.enum(_DURABILITY_MODES, message.durability.mode, "spec.durability.mode"),
            snapshot_steps=message.durability.snapshot_steps,
            snapshot_s=message.durability.snapshot_s,
            fsync=message.durability.fsync,
        ),
    )
    with within("spec"):
        return resolve(request, limits)


def values(
    messages: Sequence[tensor_pb2.Tensor], spec: SessionSpec, limits: Limits
) -> Mapping[int, Tensor]:
    """Decode values of parameters that came along with the spec, by the parameters' positions.

    Raises:
        OptserveError: One of them belongs to no parameter, or does not fit it.
    """
    positions = {parameter.name: i for i, parameter in enumerate(spec.parameters)}
    decoded: dict[int, Tensor] = {}
    for i, message in enumerate(messages):
        field = f"values[{i}]"
        position = positions.get(message.header.name)
        if position is None or position in decoded:
            raise UnknownNameError(
                f"{message.header.name!r} is no parameter of the session, or is there twice",
                field=f"{field}.header.name",
                expected="each parameter once at most",
                actual=message.header.name,
            )
        came = decode.tensor_spec(message.header, limits, f"{field}.header")
        check_fits(came, spec.parameters[position], f"{field}.header")
        decoded[position] = decode.tensor(message, limits, field)
    return decoded


def choice(
    message: optimizer_pb2.Optimizer | scheduler_pb2.Scheduler | loss_pb2.Loss,
    field: str,
    limits: Limits,
) -> Choice:
    """Decode the optimizer, scheduler or loss that a oneof chooses, by its descriptor.

    Raises:
        OptserveError: Nothing is chosen, or an argument is not allowed.
    """
    name = message.WhichOneof("kind")
    if name is None:
        raise MissingFieldError(
            f"{field} chooses nothing; see GetCatalogue for what there is",
            field=field,
            expected="one of "
            + ", ".join(each.name for each in message.DESCRIPTOR.oneofs[0].fields),
        )
    chosen: Message = getattr(message, name)
    arguments = {
        descriptor.name: _value(descriptor, value, f"{field}.{name}.{descriptor.name}", limits)
        for descriptor, value in chosen.ListFields()
    }
    return Choice(kind=chosen.DESCRIPTOR.name, arguments=arguments)


def overrides(
    message: optimizer_pb2.Optimizer, kind: str, field: str, limits: Limits
) -> Mapping[str, Value]:
    """Decode hyperparameters of a session's optimizer, which must be of the session's kind.

    Raises:
        OptserveError: They are of another kind, or one is not allowed.
    """
    if message.WhichOneof("kind") is None:
        return {}
    chosen = choice(message, field, limits)
    if chosen.kind != kind:
        raise InvalidFieldError(
            f"the hyperparameters are of {chosen.kind}; the session's optimizer is {kind}",
            field=field,
            expected=kind,
            actual=chosen.kind,
        )
    return chosen.arguments


def _group(
    message: session_pb2.ParameterGroup, kind: str, field: str, limits: Limits
) -> GroupRequest:
    decode.check_name(message.name, limits, f"{field}.name")
    return GroupRequest(
        name=message.name,
        parameters=message.parameters,
        own=overrides(message.overrides, kind, f"{field}.overrides", limits),
    )


def _value(field: FieldDescriptor, value: object, path: str, limits: Limits) -> Value:
    """Turn the value of a set field into what torch's constructor takes."""
    if field.is_repeated:
        values: Sequence[object] = value  # type: ignore[assignment]
        check_count(field, len(values), path)
        if len(values) > limits.elements_max:
            raise LimitExceededError(
                f"{field.name} has {len(values)} elements; {limits.elements_max} are allowed",
                field=path,
                expected=f"at most {limits.elements_max} elements",
                actual=f"{len(values)} elements",
            )
        return tuple(
            _value_of_one(field, each, f"{path}[{i}]", limits) for i, each in enumerate(values)
        )  # type: ignore[return-value]
    return _value_of_one(field, value, path, limits)


def _value_of_one(field: FieldDescriptor, value: object, path: str, limits: Limits) -> Value:
    if isinstance(value, tensor_pb2.Tensor):
        return decode.tensor(value, limits, path)
    if field.enum_type is not None:
        return _reduction(value, path)
    if field.cpp_type in _NUMBERS:
        check_number(field, value, path)  # type: ignore[arg-type]
    return value  # type: ignore[return-value]


def _reduction(value: object, path: str) -> str:
    names = loss_pb2.Reduction.DESCRIPTOR.values_by_number
    if value not in names:
        raise InvalidFieldError(
            "there is no such reduction", field=path, expected="a Reduction", actual=value
        )
    return names[value].name.removeprefix("REDUCTION_").lower()  # type: ignore[index]
