"""From what was asked for to what is in force: every default filled in, everything checked.

Fields in errors are paths from the spec: ``groups[0].name``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

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
    Durability,
    DurabilityMode,
    Encoding,
    GroupSpec,
    ScheduleUnit,
    SessionSpec,
    Value,
    Wire,
)
from optserve_server.core.tensors import TensorSpec, dtype_name

_SNAPSHOTS = {
    # A minute's work is what people are ready to lose who do not ask for a journal.
    DurabilityMode.SNAPSHOT: Durability(snapshot_steps=100, snapshot_s=60.0),
    # What a restart replays: some seconds for most models, and a snapshot costs little then.
    DurabilityMode.JOURNAL: Durability(snapshot_steps=1_000, snapshot_s=600.0),
}
"""How often snapshots are taken if nobody says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRequest:
    """A group as it was asked for; its name has been looked at."""

    name: str
    parameters: Sequence[str]
    """Names of its parameters."""
    own: Mapping[str, Value]
    """Hyperparameters in which it differs from the session's optimizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecRequest:
    """A session as it was asked for. None, or empty, is what the server chooses."""

    display_name: str
    parameters: Sequence[TensorSpec]
    """With unique names."""
    optimizer: Choice
    groups: Sequence[GroupRequest] = ()
    scheduler: Choice | None = None
    scheduler_field: str = "scheduler"
    """Path of what chooses the scheduler."""
    schedule_unit: ScheduleUnit = ScheduleUnit.STEPS
    loss: Choice | None = None
    workers: int = 0
    allow_non_finite: bool = False
    loss_points_max: int | None = None
    round_timeout_s: float | None = None
    wire: Wire = field(default_factory=Wire)
    durability: Durability = field(default_factory=Durability)


def resolve(request: SpecRequest, limits: Limits) -> SessionSpec:
    """Return what is in force for a session.

    Raises:
        OptserveError: Something in the request is not allowed; ``field`` says what.
    """
    _check_floating(request.parameters)
    optimizer, scheduler = request.optimizer, request.scheduler
    if scheduler:
        with within(request.scheduler_field):
            arguments = schedulers.effective_arguments(scheduler)
        scheduler = Choice(kind=scheduler.kind, arguments=arguments)
    _check_encoding(request.wire.gradients, request.parameters, "wire.gradients")
    _check_encoding(request.wire.parameters, request.parameters, "wire.parameters")
    return SessionSpec(
        display_name=request.display_name,
        parameters=tuple(request.parameters),
        optimizer=Choice(
            kind=optimizer.kind,
            arguments=optimizers.effective_hyperparameters(
                OPTIMIZERS[optimizer.kind],
                optimizer.arguments,
                {parameter.dtype for parameter in request.parameters},
            ),
        ),
        groups=_groups(request.groups, request.parameters, optimizer, limits),
        scheduler=scheduler,
        schedule_unit=request.schedule_unit,
        loss=request.loss,
        workers=_workers(request.workers, limits),
        allow_non_finite=request.allow_non_finite,
        loss_points_max=_loss_points_max(request.loss_points_max, limits),
        round_timeout_s=_round_timeout_s(request.round_timeout_s, limits),
        wire=request.wire,
        durability=_durability(request.durability),
    )


def check_fixed(
    kind: OptimizerKind, own: Mapping[str, Value], session: Mapping[str, Value], field: str
) -> None:
    """Make sure that a group does not change what torch reads once for all groups.

    A group's own would silently have no effect.

    Args:
        kind: The optimizer.
        own: What the group, or the change, sets.
        session: Hyperparameters that the session was created with.
        field: Path of what sets them.

    Raises:
        InvalidHyperparameterError: It does.
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


def _groups(
    requests: Sequence[GroupRequest],
    parameters: Sequence[TensorSpec],
    optimizer: Choice,
    limits: Limits,
) -> tuple[GroupSpec, ...]:
    if len(requests) > limits.groups_max:
        raise LimitExceededError(
            f"there are {len(requests)} groups; {limits.groups_max} are allowed",
            field="groups",
            expected=f"at most {limits.groups_max}",
            actual=len(requests),
        )
    kind = OPTIMIZERS[optimizer.kind]
    positions = {parameter.name: i for i, parameter in enumerate(parameters)}
    given: dict[str, Mapping[str, Value]] = {}
    taken: dict[str, tuple[int, ...]] = {}
    for i, request in enumerate(requests):
        field = f"groups[{i}]"
        if request.name in given:
            raise InvalidNameError(
                f"group {request.name!r} is there twice", field=f"{field}.name", actual=request.name
            )
        check_fixed(kind, request.own, optimizer.arguments, f"{field}.overrides")
        given[request.name] = {**optimizer.arguments, **request.own}
        taken[request.name] = _take(request, positions, field)
    _check_default(requests, positions)
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


def _take(request: GroupRequest, positions: dict[str, int], field: str) -> tuple[int, ...]:
    """Take the group's parameters out of those that are in no group yet."""
    if request.name == DEFAULT_GROUP:
        return ()  # It gets what the others leave.
    if not request.parameters:
        raise MissingFieldError(
            f"group {request.name!r} has no parameters",
            field=f"{field}.parameters",
            expected="a parameter",
        )
    taken = []
    for i, name in enumerate(request.parameters):
        if name not in positions:
            raise UnknownNameError(
                f"{name!r} is no parameter of the session, or is in a group already",
                field=f"{field}.parameters[{i}]",
                expected="a parameter in no other group",
                actual=name,
            )
        taken.append(positions.pop(name))
    return tuple(taken)


def _check_default(requests: Sequence[GroupRequest], rest: Collection[str]) -> None:
    """Group "default" may name what it gets anyway, as it does in an answer; nothing else."""
    for i, request in enumerate(requests):
        named = set(request.parameters)
        if request.name == DEFAULT_GROUP and named and named != set(rest):
            raise InvalidFieldError(
                "group 'default' has the parameters that are in no other; it names those, or none",
                field=f"groups[{i}].parameters",
                expected=", ".join(sorted(rest)),
                actual=", ".join(sorted(named)),
            )


def _check_floating(parameters: Sequence[TensorSpec]) -> None:
    if not parameters:
        raise MissingFieldError(
            "a session needs parameters", field="parameters", expected="a parameter"
        )
    for i, parameter in enumerate(parameters):
        if not parameter.dtype.is_floating_point:
            raise InvalidFieldError(
                f"parameter {parameter.name!r} is not floating point;"
                " an optimizer moves it by fractions",
                field=f"parameters[{i}].data_type",
                expected="FP16, BF16, FP32 or FP64",
                actual=str(parameter.dtype).removeprefix("torch."),
            )


def _check_encoding(encoding: Encoding, parameters: Sequence[TensorSpec], field: str) -> None:
    for parameter in parameters:
        if encoding is not Encoding.PLAIN and parameter.dtype != torch.float32:
            raise InvalidFieldError(
                f"{encoding} is for FP32 parameters; {parameter.name!r} is"
                f" {dtype_name(parameter.dtype)}",
                field=field,
                expected="FP32 parameters, or no encoding",
                actual=dtype_name(parameter.dtype),
            )


def _workers(count: int, limits: Limits) -> int:
    if count > limits.workers_max:
        raise LimitExceededError(
            f"the session wants {count} workers; {limits.workers_max} are allowed",
            field="workers",
            expected=f"at most {limits.workers_max}",
            actual=count,
        )
    return count or 1


def _loss_points_max(own: int | None, limits: Limits) -> int:
    if own is None:
        return limits.loss_points_max
    if own > limits.loss_points_max:
        raise LimitExceededError(
            f"the history may keep {limits.loss_points_max} points of each split",
            field="limits.loss_points_max",
            expected=f"at most {limits.loss_points_max}",
            actual=own,
        )
    return own


def _round_timeout_s(own: float | None, limits: Limits) -> float:
    if own is None:
        return limits.round_timeout_s
    if not own > 0:  # Nor NaN.
        raise InvalidFieldError(
            "a step must wait for a while",
            field="limits.round_timeout_s",
            expected="above 0",
            actual=own,
        )
    if own > limits.round_timeout_s:
        raise LimitExceededError(
            f"a step may wait {limits.round_timeout_s:g} s for other workers",
            field="limits.round_timeout_s",
            expected=f"at most {limits.round_timeout_s:g}",
            actual=own,
        )
    return own


def _durability(own: Durability) -> Durability:
    if not 0 <= own.snapshot_s < math.inf:  # Nor NaN.
        raise InvalidFieldError(
            "a snapshot is taken after some seconds",
            field="durability.snapshot_s",
            expected="0 or more, and finite",
            actual=own.snapshot_s,
        )
    if own.fsync and own.mode is not DurabilityMode.JOURNAL:
        raise InvalidFieldError(
            f"fsync is for mode JOURNAL; the session's is {own.mode.name}",
            field="durability.fsync",
            expected="unset",
            actual="true",
        )
    if own.mode is DurabilityMode.NONE:
        if own != Durability():
            raise InvalidFieldError(
                "there are no snapshots of a session that is in memory only; choose a mode",
                field="durability.mode",
                expected="SNAPSHOT or JOURNAL",
                actual="NONE",
            )
        return own
    default = _SNAPSHOTS[own.mode]
    return dataclasses.replace(
        own,
        snapshot_steps=own.snapshot_steps or default.snapshot_steps,
        snapshot_s=own.snapshot_s or default.snapshot_s,
    )
