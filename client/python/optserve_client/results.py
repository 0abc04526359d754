"""What calls answer with, where the contract's own messages would be less at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias, overload

from optserve.v1 import optimizer_service_pb2 as service_pb2
from optserve.v1 import session_pb2
from optserve_client.tensors import Array

MaybeNone: TypeAlias = Any
"""None if the caller has not asked: typed as in typeshed, so that one who has need not check."""

Split: TypeAlias = Literal["train", "validation"]
"""On which data a loss was evaluated."""

SPLITS: dict[Split, session_pb2.Split.ValueType] = {
    "train": session_pb2.Split.SPLIT_TRAIN,
    "validation": session_pb2.Split.SPLIT_VALIDATION,
}


class Parameters(Mapping[str, Array]):
    """Values of parameters: read-only arrays by name, in the session's order."""

    def __init__(self, values: Mapping[str, Array], *, steps: int) -> None:
        """Hold ``values`` as they are after ``steps`` steps."""
        self._values = values
        self.steps = steps

    def __getitem__(self, name: str) -> Array:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Parameters({dict(self._values)!r}, steps={self.steps})"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step did. The parameters after it are the session's ``parameters``."""

    step: int
    """Number of the step, from 1."""
    epochs: int
    """How many epochs had been ended."""
    rates: Mapping[str, float]
    """Learning rate that this step used, by group."""
    gradient_norm: float
    """Euclidean norm of the gradient that was applied, over all parameters."""
    replayed: bool
    """The step had been applied before: these gradients were not used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """The last step that the server has of a worker, and where the session stands."""

    step: int
    """Number of the step. Zero: the worker has sent none."""
    digest: bytes
    """What its content is known by: of the gradients' bytes, or drawn at random where they lie in
    shared memory. Empty: the client that sent it gave none."""
    applied: bool
    """Whether it was applied. If not, it waits for the other workers."""
    result: StepResult | None
    """What it did; None if it was not applied yet, or another one was since."""
    steps: int
    """How many steps of the session have been applied."""
    epochs: int
    """How many of its epochs have been ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossResult:
    """What an evaluation of the loss found."""

    loss: float
    """The value; may be NaN or infinite."""
    accuracy: float | None
    """Share of right predictions, from 0 to 1; None if the loss is not one of classification."""
    steps: int
    """How many steps had been applied."""
    gradient: Array | MaybeNone
    """Of the loss with respect to the predictions; None if not asked for."""
    elements: Array | None
    """Every element of the loss; None unless its reduction is REDUCTION_NONE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPoint:
    """One evaluation in the session's history."""

    sequence: int
    """Number of the point in its session, from 1, over both splits."""
    split: Split
    """On which data."""
    steps: int
    """How many steps had been applied."""
    epochs: int
    """How many epochs had been ended."""
    loss: float
    """The value; may be NaN or infinite."""
    accuracy: float | None
    """Share of right predictions, from 0 to 1; None if the loss is not one of classification."""
    time: datetime
    """When it was evaluated, in UTC."""


class LossHistory(Sequence[LossPoint]):
    """The points of a session's history, the oldest first."""

    def __init__(self, points: Sequence[LossPoint], *, forgotten: int) -> None:
        """Hold ``points``, before which there were ``forgotten`` more."""
        self._points = tuple(points)
        self.forgotten = forgotten

    @overload
    def __getitem__(self, index: int) -> LossPoint: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LossPoint, ...]: ...
    def __getitem__(self, index: int | slice) -> LossPoint | tuple[LossPoint, ...]:
        return self._points[index]

    def __len__(self) -> int:
        return len(self._points)

    def __repr__(self) -> str:
        return f"LossHistory({list(self._points)!r}, forgotten={self.forgotten})"


def step_result(message: service_pb2.StepResult) -> StepResult:
    """Return what the message says of the step; its tensors come elsewhere."""
    return StepResult(
        step=message.step,
        epochs=message.epochs,
        rates={rate.group: rate.lr for rate in message.rates},
        gradient_norm=message.gradient_norm,
        replayed=message.replayed,
    )


def contribution(message: service_pb2.GetContributionResponse) -> Contribution:
    """Return what the message says of a worker's last step."""
    last, status = message.contribution, message.status
    return Contribution(
        step=last.step,
        digest=last.digest,
        applied=last.applied,
        result=step_result(message.result) if message.HasField("result") else None,
        steps=status.steps,
        epochs=status.epochs,
    )


def loss_result(message: service_pb2.LossResult, tensors: Mapping[str, Array]) -> LossResult:
    """Return what the message says, with the tensors that came with it, by name."""
    return LossResult(
        loss=message.loss,
        accuracy=message.accuracy if message.HasField("accuracy") else None,
        steps=message.steps,
        gradient=tensors.get("gradient"),
        elements=tensors.get("elements"),
    )


def loss_point(message: session_pb2.LossPoint) -> LossPoint:
    """Return the point of the message."""
    return LossPoint(
        sequence=message.sequence,
        split="train" if message.split == session_pb2.Split.SPLIT_TRAIN else "validation",
        steps=message.steps,
        epochs=message.epochs,
        loss=message.loss,
        accuracy=message.accuracy if message.HasField("accuracy") else None,
        time=message.time.ToDatetime(UTC),
    )
