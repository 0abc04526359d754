"""What a session is made from.

A spec that exists has been checked against the limits and against itself.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from optserve_server.core.tensors import TensorSpec

DEFAULT_GROUP = "default"
"""Name of the group of the parameters that are in no other."""

Value = bool | int | float | str | tuple[float, ...] | tuple[int, ...] | tuple[str, ...] | Tensor
"""Of a hyperparameter or an argument; sequences are tuples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An optimizer, a scheduler or a loss.

    Torch's name of it, and the arguments that were given.
    """

    kind: str
    """torch's name: ``Adam``."""
    arguments: Mapping[str, Value] = field(default_factory=dict)
    """Only those that were given; torch's defaults hold for the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSpec:
    """Parameters that share hyperparameters."""

    name: str
    parameters: tuple[int, ...]
    """Positions in SessionSpec.parameters."""
    hyperparameters: Mapping[str, Value]
    """Every hyperparameter in force; see optimizers.effective_hyperparameters."""


class ScheduleUnit(enum.StrEnum):
    """What a scheduler counts."""

    STEPS = "steps"
    EPOCHS = "epochs"


class Split(enum.StrEnum):
    """Which data a loss was evaluated on; NONE is not kept in the history."""

    NONE = "none"
    TRAIN = "train"
    VALIDATION = "validation"


class Encoding(enum.StrEnum):
    """How the elements of a step's tensors travel; PLAIN is in their own data type."""

    PLAIN = "PLAIN"
    BF16 = "BF16"
    FP16 = "FP16"
    INT8_BLOCKS = "INT8_BLOCKS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """How the tensors of a step travel, in each direction."""

    gradients: Encoding = Encoding.PLAIN
    parameters: Encoding = Encoding.PLAIN


class DurabilityMode(enum.StrEnum):
    """What survives the process of the server."""

    NONE = "none"
    """Nothing: the session is in memory only."""
    SNAPSHOT = "snapshot"
    """The session as it was at its last snapshot."""
    JOURNAL = "journal"
    """Whatever was acknowledged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Durability:
    """How much of a session may be lost."""

    mode: DurabilityMode = DurabilityMode.NONE
    snapshot_steps: int = 0
    """After how many steps a snapshot is taken, at the latest; 0: however many."""
    snapshot_s: float = 0.0
    """After how many seconds a change is in a snapshot, at the latest; 0: however many."""
    fsync: bool = False
    """Whether what was acknowledged survives a loss of power too. JOURNAL only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSpec:
    """What is in force for a session, every default filled in."""

    display_name: str
    parameters: tuple[TensorSpec, ...]
    optimizer: Choice
    groups: tuple[GroupSpec, ...]
    """Every parameter is in exactly one; "default" comes first if it has any."""
    scheduler: Choice | None
    schedule_unit: ScheduleUnit
    loss: Choice | None
    workers: int
    allow_non_finite: bool
    loss_points_max: int
    round_timeout_s: float
    wire: Wire = field(default_factory=Wire)
    """Anything but PLAIN only if every parameter is FP32."""
    durability: Durability = field(default_factory=Durability)
