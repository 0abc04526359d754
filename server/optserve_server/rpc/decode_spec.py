"""A session's spec: messages into what the core builds a session from, every default filled in."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from torch import Tensor

from optserve.v1 import loss_pb2, optimizer_pb2, scheduler_pb2, session_pb2, tensor_pb2
from optserve_server.core import optimizers, schedulers
from optserve_server.core.errors import (
    InvalidFieldError,
    InvalidHyperparameterError,
    InvalidNameError,
    LimitExceededError,
    MissingFieldError,
    UnknownNameError,
    within,
)
from optserve_server.core.limits import Limits
from optserve_server.core.optimizers import OPTIMIZERS, OptimizerKind
from optserve_server.core.spec import (
    DEFAULT_GROUP,
    Choice,
    Encoding,
    GroupSpec,
    ScheduleUnit,
    SessionSpec,
    Value,
    Wire,
)
from optserve_server.core.tensors import TensorSpec, check_fits, dtype_name
from optserve_server.rpc import decode
from optserve_server.rpc.constraints import check_count, check_number
from optserve_server.rpc.encoded import ENCODINGS

_NUMBERS = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_INT64)
_UNITS: Mapping[int, ScheduleUnit] = {
    scheduler_pb2.SCHEDULE_UNIT_UNSPECIFIED: ScheduleUnit.STEPS,
    scheduler_pb2.SCHEDULE_UNIT_STEPS: ScheduleUnit.STEPS,
    scheduler_pb2.SCHEDULE_UNIT_EPOCHS: ScheduleUnit.EPOCHS,
}
_ENCODINGS: Mapping[int, Encoding] = {number: encoding for encoding, number in ENCODINGS.items()}


def session_spec(message: session_pb2.SessionSpec, limits: Limits) -> SessionSpec:
    """Decode what a session is to be made from, and fill in every default.

    Raises:
        OptserveError: Something in it is not allowed; ``field`` says what.
    """
    parameters = decode.tensor_specs(message.parameters, limits, "spec.parameters")
    _check_floating(parameters)
    if not message.HasField("optimizer"):
        raise MissingFieldError(
            "a session needs an optimizer", field="spec.optimizer", expected="an optimizer"
        )
    optimizer = choice(message.optimizer, "spec.optimizer", limits)
    scheduler = (
        choice(message.scheduler, "spec.scheduler", limits)
        if message.HasField("scheduler")
        else None
    )
    if scheduler:
        with within(f"spec.scheduler.{message.scheduler.WhichOneof('kind')}"):
            arguments = schedulers.effective_arguments(scheduler)
        scheduler = Choice(kind=scheduler.kind, arguments=arguments)
    return SessionSpec(
        display_name=decode.display_name(message.display_name, limits, "spec.display_name"),
        parameters=tuple(parameters),
        optimizer=Choice(
            kind=optimizer.kind,
            arguments=optimizers.effective_hyperparameters(
                OPTIMIZERS[optimizer.kind],
                optimizer.arguments,
                {parameter.dtype for parameter in parameters},
            ),
        ),
        groups=_groups(message.groups, parameters, optimizer, limits),
        scheduler=scheduler,
        schedule_unit=decode.enum(_UNITS, message.scheduler.unit, "spec.scheduler.unit"),
        loss=choice(message.loss, "spec.loss", limits) if message.HasField("loss") else None,
        workers=_workers(message.workers, limits),
        allow_non_finite=bool(decode.non_finite(message.non_finite, "spec.non_finite")),
        loss_points_max=_loss_points_max(message.limits, limits),
        round_timeout_s=_round_timeout_s(message.limits, limits),
        wire=Wire(
            gradients=_encoding(message.wire.gradients, parameters, "spec.wire.gradients"),
            parameters=_encoding(message.wire.parameters, parameters, "spec.wire.parameters"),
        ),
    )


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


def check_change(
    kind: OptimizerKind, own: Mapping[str, Value], group: GroupSpec, field: str
) -> None:
    """Make sure that a running session's group can take new hyperparameters at all.

    Raises:
        InvalidHyperparameterError: torch would silently go on without one.
    """
    _check_fixed(kind, own, group.hyperparameters, field)


def _groups(
    messages: Sequence[session_pb2.ParameterGroup],
    parameters: Sequence[TensorSpec],
    optimizer: Choice,
    limits: Limits,
) -> tuple[GroupSpec, ...]:
    if len(messages) > limits.groups_max:
        raise LimitExceededError(
            f"there are {len(messages)} groups; {limits.groups_max} are allowed",
            field="spec.groups",
            expected=f"at most {limits.groups_max}",
            actual=len(messages),
        )
    kind = OPTIMIZERS[optimizer.kind]
    positions = {parameter.name: i for i, parameter in enumerate(parameters)}
    given: dict[str, Mapping[str, Value]] = {}
    taken: dict[str, tuple[int, ...]] = {}
    for i, message in enumerate(messages):
        field = f"spec.groups[{i}]"
        decode.check_name(message.name, limits, f"{field}.name")
        if message.name in given:
            raise InvalidNameError(
                f"group {message.name!r} is there twice", field=f"{field}.name", actual=message.name
            )
        own = overrides(message.overrides, kind.name, f"{field}.overrides", limits)
        _check_fixed(kind, own, optimizer.arguments, f"{field}.overrides")
        given[message.name] = {**optimizer.arguments, **own}
        taken[message.name] = _take(message, positions, field)
    _check_default(messages, positions)
    # The rest is the default group, which comes first if there is any.
    given = {DEFAULT_GROUP: optimizer.arguments, **given}
    taken |= {DEFAULT_GROUP: tuple(positions.values())}
    return tuple(
        GroupSpec(
            name=name,
            parameters=taken[name],
            hyperparameters=optimizers.effective_hyperparameters(
                kind, hyperparameters, {parameters[i].dtype for i in taken[name]}
            ),
        )
        for name, hyperparameters in given.items()
        if taken[name]
    )


def _take(
    message: session_pb2.ParameterGroup, positions: dict[str, int], field: str
) -> tuple[int, ...]:
    """Take the group's parameters out of those that are in no group yet."""
    if message.name == DEFAULT_GROUP:
        return ()  # It gets what the others leave.
    if not message.parameters:
        raise MissingFieldError(
            f"group {message.name!r} has no parameters",
            field=f"{field}.parameters",
            expected="a parameter",
        )
    taken = []
    for i, name in enumerate(message.parameters):
        if name not in positions:
            raise UnknownNameError(
                f"{name!r} is no parameter of the session, or is in a group already",
                field=f"{field}.parameters[{i}]",
                expected="a parameter in no other group",
                actual=name,
            )
        taken.append(positions.pop(name))
    return tuple(taken)


def _check_default(messages: Sequence[session_pb2.ParameterGroup], rest: Collection[str]) -> None:
    """Group "default" may name what it gets anyway, as it does in an answer; nothing else."""
    for i, message in enumerate(messages):
        named = set(message.parameters)
        if message.name == DEFAULT_GROUP and named and named != set(rest):
            raise InvalidFieldError(
                "group 'default' has the parameters that are in no other; it names those, or none",
                field=f"spec.groups[{i}].parameters",
                expected=", ".join(sorted(rest)),
                actual=", ".join(sorted(named)),
            )


def _check_fixed(
    kind: OptimizerKind, own: Mapping[str, Value], session: Mapping[str, Value], field: str
) -> None:
    """Torch reads some hyperparameters once for all groups.

    A group's own would silently have no effect.
    """
    in_force = optimizers.effective_hyperparameters(kind, session)
    for name in kind.fixed:
        if name in own and own[name] != in_force[name]:
            raise InvalidHyperparameterError(
                f"{name} of {kind.name} is one for the whole session, from its beginning",
                field=f"{field}.{name}",
                expected=in_force[name],
                actual=own[name],
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


def _check_floating(parameters: Sequence[TensorSpec]) -> None:
    if not parameters:
        raise MissingFieldError(
            "a session needs parameters", field="spec.parameters", expected="a parameter"
        )
    for i, parameter in enumerate(parameters):
        if not parameter.dtype.is_floating_point:
            raise InvalidFieldError(
                f"parameter {parameter.name!r} is not floating point;"
                " an optimizer moves it by fractions",
                field=f"spec.parameters[{i}].data_type",
                expected="FP16, BF16, FP32 or FP64",
                actual=str(parameter.dtype).removeprefix("torch."),
            )


def _workers(count: int, limits: Limits) -> int:
    if count > limits.workers_max:
        raise LimitExceededError(
            f"the session wants {count} workers; {limits.workers_max} are allowed",
            field="spec.workers",
            expected=f"at most {limits.workers_max}",
            actual=count,
        )
    return count or 1


def _loss_points_max(own: session_pb2.SessionLimits, limits: Limits) -> int:
    if not own.HasField("loss_points_max"):
        return limits.loss_points_max
    if own.loss_points_max > limits.loss_points_max:
        raise LimitExceededError(
            f"the history may keep {limits.loss_points_max} points of each split",
            field="spec.limits.loss_points_max",
            expected=f"at most {limits.loss_points_max}",
            actual=own.loss_points_max,
        )
    return own.loss_points_max


def _round_timeout_s(own: session_pb2.SessionLimits, limits: Limits) -> float:
    if not own.HasField("round_timeout_s"):
        return limits.round_timeout_s
    if not own.round_timeout_s > 0:  # Nor NaN.
        raise InvalidFieldError(
            "a step must wait for a while",
            field="spec.limits.round_timeout_s",
            expected="above 0",
            actual=own.round_timeout_s,
        )
    if own.round_timeout_s > limits.round_timeout_s:
        raise LimitExceededError(
            f"a step may wait {limits.round_timeout_s:g} s for other workers",
            field="spec.limits.round_timeout_s",
            expected=f"at most {limits.round_timeout_s:g}",
            actual=own.round_timeout_s,
        )
    return own.round_timeout_s


def _encoding(value: int, parameters: Sequence[TensorSpec], field: str) -> Encoding:
    encoding = decode.enum(_ENCODINGS, value, field)
    for parameter in parameters:
        if encoding is not Encoding.PLAIN and parameter.dtype != torch.float32:
            raise InvalidFieldError(
                f"{encoding} is for FP32 parameters; {parameter.name!r} is"
                f" {dtype_name(parameter.dtype)}",
                field=field,
                expected="FP32 parameters, or no encoding",
                actual=dtype_name(parameter.dtype),
            )
    return encoding
