"""What a user says about a session, as the contract's messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Required, TypeAlias, TypedDict, TypeVar, get_args

from google.protobuf.message import Message
from numpy.typing import DTypeLike

from optserve.v1.loss_pb2 import Loss
from optserve.v1.optimizer_pb2 import Optimizer
from optserve.v1.optimizer_service_pb2 import UpdateSessionRequest
from optserve.v1.scheduler_pb2 import Scheduler
from optserve.v1.scheduler_pb2 import ScheduleUnit as Unit
from optserve.v1.session_pb2 import Durability as DurabilityMessage
from optserve.v1.session_pb2 import DurabilityMode as Mode
from optserve.v1.session_pb2 import NonFinitePolicy, SessionLimits, SessionSpec
from optserve.v1.session_pb2 import ParameterGroup as Group
from optserve.v1.session_pb2 import Wire as WireMessage
from optserve.v1.tensor_pb2 import Encoding, TensorHeader
from optserve_client.lr_scheduler import AnyScheduler
from optserve_client.nn import AnyLoss
from optserve_client.optim import AnyOptimizer

ScheduleUnit: TypeAlias = Literal["steps", "epochs"]
"""What a scheduler counts: steps, or the epochs that ``Session.end_epoch`` ends."""

Via: TypeAlias = Literal["stream", "unary"]
"""How tensors travel: in a stream, or in one message each way, for small ones where streams do not
pass."""

WireEncoding: TypeAlias = Literal["BF16", "FP16", "INT8_BLOCKS"]
"""What stands for float32 elements on the wire, as ``Encoding`` in the contract has it."""

DurabilityMode: TypeAlias = Literal["NONE", "SNAPSHOT", "JOURNAL"]
"""What survives the process of the server."""

_UNITS = {"steps": Unit.SCHEDULE_UNIT_STEPS, "epochs": Unit.SCHEDULE_UNIT_EPOCHS}

_Choice = TypeVar("_Choice", bound=Message)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Parameters that share hyperparameters; all others are in the group "default"."""

    name: str
    """Unique in the session."""
    parameters: Sequence[str] = ()
    """Names of the parameters. Empty when a running session is updated, and for "default"."""
    overrides: AnyOptimizer | None = None
    """Hyperparameters in which the group differs, as an optimizer of the session's kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """How the tensors of steps travel where fewer bytes are wanted; all parameters must be float32.

    None is exact. "BF16" and "FP16" round to half the bytes. "INT8_BLOCKS" rounds to a quarter, and
    makes good in the next step what it has rounded away in this one.
    """

    gradients: WireEncoding | None = None
    parameters: WireEncoding | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Durability:
    """How much of a session may be lost; anything but "NONE" takes a server with a data directory.

    "SNAPSHOT" loses what came after the last snapshot; ``status().durable_steps`` says from where
    to go on. "JOURNAL" loses nothing that was answered. Zeros leave it to the server, whose answer
    tells.
    """

    mode: DurabilityMode = "NONE"
    snapshot_steps: int = 0
    """After how many steps a snapshot is taken."""
    snapshot_s: float = 0.0
    """After how many seconds a change is in a snapshot."""
    fsync: bool = False
    """Whether an answered step also survives a loss of power; for "JOURNAL" only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placeholder:
    """Stands for a parameter whose value is uploaded after the session has been created."""

    shape: Sequence[int]
    """Of the parameter; empty for a scalar."""
    dtype: DTypeLike
    """Of the parameter: a NumPy data type, or ``BF16``."""


class SpecOptions(TypedDict, total=False):
    """What a session is made from, beside its parameters. Only ``optimizer`` is required."""

    optimizer: Required[AnyOptimizer]
    """Such as ``optim.Adam(lr=1e-3)``; what is left out is torch's default."""
    scheduler: AnyScheduler | None
    """Of the learning rates, such as ``lr_scheduler.StepLR(step_size=30)``. None: they stay."""
    schedule_unit: ScheduleUnit
    """What the scheduler counts. Default: steps."""
    loss: AnyLoss | None
    """What ``evaluate_loss`` computes, such as ``nn.MSELoss()``. None: nothing."""
    groups: Sequence[ParameterGroup]
    """Parameters with hyperparameters of their own. Default: none."""
    workers: int
    """How many contribute to each step, which is the mean of their gradients. Default: 1."""
    allow_non_finite: bool
    """Whether a gradient with a NaN or an infinity is applied, as torch does. Default: refused."""
    display_name: str
    """For people. Default: none."""
    loss_points_max: int
    """How many points of each split the history keeps. Default: as many as the server allows."""
    round_timeout_s: float
    """How long a step waits for the other workers. Default: as long as the server allows."""
    wire: Wire
    """How gradients and parameters travel, such as ``Wire(gradients="BF16")``. Default: exactly."""
    durability: Durability
    """What survives the server, such as ``Durability(mode="JOURNAL")``. Default: nothing."""


class WorkerOptions(TypedDict, total=False):
    """How this client takes part in a session."""

    worker: int
    """Which of the session's workers it is, from 0. Default: 0."""
    via: Via
    """How its steps travel. Default: "stream"."""


class SessionOptions(SpecOptions, WorkerOptions, total=False):
    """What a session is made from, beside its parameters, and how this client takes part in it."""


class UpdateOptions(TypedDict, total=False):
    """What changes in a running session; what is left out stays."""

    optimizer: AnyOptimizer
    """Hyperparameters to change in every group; of the session's kind."""
    groups: Sequence[ParameterGroup]
    """Hyperparameters to change in single groups, after ``optimizer``."""
    loss: AnyLoss
    """Replaces the loss."""
    allow_non_finite: bool
    """Replaces the policy."""
    display_name: str
    """Replaces the name."""


def session_spec(
    headers: Sequence[TensorHeader],
    *,
    optimizer: AnyOptimizer,
    scheduler: AnyScheduler | None = None,
    schedule_unit: ScheduleUnit = "steps",
    loss: AnyLoss | None = None,
    groups: Sequence[ParameterGroup] = (),
    workers: int = 1,
    allow_non_finite: bool = False,
    display_name: str = "",
    loss_points_max: int | None = None,
    round_timeout_s: float | None = None,
    wire: Wire | None = None,
    durability: Durability | None = None,
) -> SessionSpec:
    """Return the spec of a new session; the arguments are those of ``SpecOptions``.

    Raises:
        TypeError, ValueError: Something is not of the kind that it must be.
    """
    return SessionSpec(
        display_name=display_name,
        parameters=headers,
        optimizer=_choose(Optimizer(), optimizer, "optimizer"),
        groups=[_group(group) for group in groups],
        scheduler=None if scheduler is None else _scheduler(scheduler, schedule_unit),
        loss=None if loss is None else _choose(Loss(), loss, "loss"),
        workers=workers,
        non_finite=_non_finite_policy(allowed=allow_non_finite),
        limits=SessionLimits(loss_points_max=loss_points_max, round_timeout_s=round_timeout_s),
        wire=None if wire is None else _wire(wire),
        durability=None if durability is None else _durability(durability),
    )


def update_request(
    session_id: str,
    *,
    optimizer: AnyOptimizer | None = None,
    groups: Sequence[ParameterGroup] = (),
    loss: AnyLoss | None = None,
    allow_non_finite: bool | None = None,
    display_name: str | None = None,
) -> UpdateSessionRequest:
    """Return the request that changes a session; the arguments are those of ``UpdateOptions``.

    Raises:
        TypeError: Something is not of the kind that it must be.
    """
    return UpdateSessionRequest(
        session_id=session_id,
        optimizer=None if optimizer is None else _choose(Optimizer(), optimizer, "optimizer"),
        groups=[_group(group) for group in groups],
        loss=None if loss is None else _choose(Loss(), loss, "loss"),
        non_finite=(
            NonFinitePolicy.NON_FINITE_POLICY_UNSPECIFIED
            if allow_non_finite is None
            else _non_finite_policy(allowed=allow_non_finite)
        ),
        display_name=display_name,
    )


def _group(group: ParameterGroup) -> Group:
    overrides = group.overrides
    return Group(
        name=group.name,
        parameters=group.parameters,
        overrides=None if overrides is None else _choose(Optimizer(), overrides, "overrides"),
    )


def _scheduler(kind: AnyScheduler, unit: ScheduleUnit) -> Scheduler:
    if unit not in _UNITS:
        raise ValueError(f"schedule_unit must be 'steps' or 'epochs', not {unit!r}")
    scheduler = _choose(Scheduler(), kind, "scheduler")
    scheduler.unit = _UNITS[unit]
    return scheduler


def _wire(wire: Wire) -> WireMessage:
    return WireMessage(
        gradients=_encoding(wire.gradients, "gradients"),
        parameters=_encoding(wire.parameters, "parameters"),
    )


def _durability(durability: Durability) -> DurabilityMessage:
    if durability.mode not in get_args(DurabilityMode):
        names = ", ".join(get_args(DurabilityMode))
        raise ValueError(f"mode must be one of {names}, not {durability.mode!r}")
    return DurabilityMessage(
        mode=Mode.Value(f"DURABILITY_MODE_{durability.mode}"),
        snapshot_steps=durability.snapshot_steps,
        snapshot_s=durability.snapshot_s,
        fsync=durability.fsync,
    )


def _encoding(name: WireEncoding | None, direction: str) -> Encoding.ValueType:
    if name is None:
        return Encoding.ENCODING_UNSPECIFIED
    if name not in get_args(WireEncoding):
        names = ", ".join(get_args(WireEncoding))
        raise ValueError(f"{direction} must be None or one of {names}, not {name!r}")
    return Encoding.Value(f"ENCODING_{name}")


def _choose(choice: _Choice, kind: object, argument: str) -> _Choice:
    """Set the arm that has the type of ``kind``, and return the message."""
    arms = choice.DESCRIPTOR.oneofs_by_name["kind"].fields
    for arm in arms:
        if isinstance(kind, Message) and arm.message_type is kind.DESCRIPTOR:
            chosen: Message = getattr(choice, arm.name)
            chosen.CopyFrom(kind)
            chosen.SetInParent()  # Copying a message without fields would leave the arm unset.
            return choice
    names = ", ".join(arm.message_type.name for arm in arms if arm.message_type is not None)
    raise TypeError(f"{argument} must be one of {names}, not {type(kind).__name__}")


def _non_finite_policy(*, allowed: bool) -> NonFinitePolicy.ValueType:
    if allowed:
        return NonFinitePolicy.NON_FINITE_POLICY_ALLOW
    return NonFinitePolicy.NON_FINITE_POLICY_REFUSE
