"""What a session must be: torch.optim for the values, plain numbers and dicts for all else."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from messages import bytes_of
from scenarios.models import B_GROUP, EPOCHS_UNIT, STEPS_UNIT, model, spec
from torch import Tensor

from optserve.v1.loss_pb2 import L1Loss, MSELoss
from optserve.v1.optimizer_pb2 import SGD, Adam
from optserve.v1.scheduler_pb2 import ScheduleUnit, StepLR
from optserve.v1.session_pb2 import (
    DURABILITY_MODE_JOURNAL,
    DURABILITY_MODE_SNAPSHOT,
    NON_FINITE_POLICY_ALLOW,
    NON_FINITE_POLICY_REFUSE,
    SPLIT_UNSPECIFIED,
    Durability,
    NonFinitePolicy,
    SessionSpec,
    SessionState,
    Split,
)

Content = Mapping[str, Tensor]
"""Gradients by the names of their parameters; not of all of them, perhaps."""

OPTIMIZERS = {"SGD": SGD, "Adam": Adam}
LOSSES = {"mse_loss": (MSELoss(), torch.nn.MSELoss()), "l1_loss": (L1Loss(), torch.nn.L1Loss())}
GROUPS = {"default": ["w"], "bias": ["b"]}
POINTS_MAX = 2  # Of each split: a history is full soon.
PATIENT_S, IMPATIENT_S = 60.0, 0.02
# Halves: rates that are powers of two are exact, however they are computed.
_STEP_SIZE, _GAMMA = 2, 0.5


class RefusalError(Exception):
    """The server must refuse it, for this reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a session is asked to be."""

    optimizer: str
    lr: float
    unit: ScheduleUnit.ValueType | None
    """What its schedule counts. None: it has none."""
    loss: str | None
    workers: int
    durability: Durability
    patience_s: float
    """How long a step waits for the other workers."""

    @property
    def spec(self) -> SessionSpec:
        """As a message."""
        scheduler = StepLR(step_size=_STEP_SIZE, gamma=_GAMMA)
        wanted = spec(
            OPTIMIZERS[self.optimizer](lr=self.lr),
            groups=[B_GROUP],
            scheduler=scheduler if self.unit is not None else None,
            unit=self.unit or STEPS_UNIT,
            loss=LOSSES[self.loss][0] if self.loss else None,
            workers=self.workers,
        )
        wanted.durability.CopyFrom(self.durability)
        wanted.limits.loss_points_max = POINTS_MAX
        wanted.limits.round_timeout_s = self.patience_s
        return wanted

    @property
    def journals(self) -> bool:
        """Whether nothing that was acknowledged may be lost."""
        return self.durability.mode == DURABILITY_MODE_JOURNAL

    @property
    def is_durable(self) -> bool:
        """Whether it survives its server."""
        return self.journals or self.takes_snapshots

    @property
    def takes_snapshots(self) -> bool:
        """Whether no more may be lost than what came after the last snapshot."""
        return self.durability.mode == DURABILITY_MODE_SNAPSHOT

    @property
    def is_patient(self) -> bool:
        """Whether a step waits for other workers for longer than anything takes here."""
        return self.patience_s >= PATIENT_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a step did."""

    step: int
    epochs: int
    rates: Mapping[str, float]
    norm: float
    digests: Sequence[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """An evaluation in the history."""

    sequence: int
    split: Split.ValueType
    steps: int
    epochs: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """The last step that a worker has ended."""

    step: int
    digest: bytes
    applied: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that can be seen of a session."""

    state: SessionState.ValueType
    steps: int
    epochs: int
    rates: Mapping[str, float]
    display_name: str
    momenta: Mapping[str, float]
    loss: str | None
    non_finite: NonFinitePolicy.ValueType
    parameters: Mapping[str, bytes] | None
    """None: not all of them have values."""
    points: Sequence[Point]
    forgotten: int
    contributions: Sequence[Contribution | None]
    """By worker."""


@dataclass(slots=True)
class Session:
    """A session, as one would write it who had no network, no disk and nobody else."""

    wanted: Wanted
    steps: int = 0
    epochs: int = 0
    display_name: str = ""
    non_finite: NonFinitePolicy.ValueType = NON_FINITE_POLICY_REFUSE
    last: Outcome | None = None
    round: dict[int, tuple[Content, bytes]] = field(default_factory=dict)
    """What the next step has so far, by worker, with its digest."""
    changes: int = 0
    """How often it was changed."""
    loss: str | None = field(init=False)
    values: dict[str, Tensor] = field(init=False)
    unset: set[str] = field(init=False)
    _torch: torch.optim.Optimizer = field(init=False)
    _bases: dict[str, float] = field(init=False)
    """Rates by group, as if the schedule had begun with them."""
    _epoch_steps: int = 0
    _points: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loss = self.wanted.loss
        self.values = {name: torch.zeros_like(value) for name, value in model().items()}
        self.unset = set(self.values)
        self._bases = dict.fromkeys(GROUPS, self.wanted.lr)
        groups = [{"params": [self.values[name] for name in names]} for names in GROUPS.values()]
        torch_class = getattr(torch.optim, self.wanted.optimizer)
        self._torch = torch_class(groups, lr=self.wanted.lr, fused=True)

    @property
    def rates(self) -> dict[str, float]:
        """What the next step will use."""
        return {name: base * self._share for name, base in self._bases.items()}

    def set_values(self, values: Mapping[str, Tensor]) -> None:
        """Set values of parameters."""
        for name, value in values.items():
            self.values[name].copy_(value)
        self.unset -= values.keys()
        self.changes += 1

    def contribute(
        self, worker: int, step: int, content: Content, digest: bytes, *, bare: bool = False
    ) -> tuple[Outcome, bool] | None:
        """Take a worker's contribution to a step.

        Args:
            worker: Who sends.
            step: Number of the step.
            content: Gradients.
            digest: What identifies them; empty: nothing.
            bare: Whether they are left out.

        Returns:
            What the step did, and whether that had been done before; None if it waits for others.
        """
        if self.unset:
            raise RefusalError("PARAMETERS_NOT_SET")
        if step not in (self.steps, self.steps + 1) or step == 0:
            raise RefusalError("STEP_OUT_OF_ORDER")
        if step == self.steps:
            assert self.last is not None
            self._check_same(self.last.digests[worker], digest)
            return self.last, True
        if worker in self.round:
            self._check_same(self.round[worker][1], digest)
            return None
        if bare and content:
            raise RefusalError("BYTE_COUNT_MISMATCH")
        if self.wanted.workers > 1:
            self._check_finite(content)
        contents = [*self.round.items(), (worker, (content, digest))]
        if len(contents) < self.wanted.workers:
            self.round[worker] = content, digest
            return None
        self.round = {}
        return self._step([each for _, each in sorted(contents, key=lambda item: item[0])]), False

    @property
    def contributions(self) -> list[Contribution | None]:
        """What each worker has ended last."""
        found: list[Contribution | None] = []
        for worker in range(self.wanted.workers):
            if worker in self.round:
                digest = self.round[worker][1]
                found.append(Contribution(step=self.steps + 1, digest=digest, applied=False))
            elif self.last:
                digest = self.last.digests[worker]
                found.append(Contribution(step=self.steps, digest=digest, applied=True))
            else:
                found.append(None)
        return found

    def end_epoch(self, epoch: int) -> None:
        """End an epoch, once."""
        if epoch == self.epochs and epoch > 0:
            return
        if epoch != self.epochs + 1:
            raise RefusalError("EPOCH_OUT_OF_ORDER")
        if not self._epoch_steps:
            raise RefusalError("EPOCH_EMPTY")
        self.epochs, self._epoch_steps = epoch, 0
        self.changes += 1

    def update(
        self,
        *,
        rates: Mapping[str, float],
        momentum: float | None,
        loss: str | None,
        non_finite: NonFinitePolicy.ValueType,
        display_name: str | None,
    ) -> None:
        """Change what is given: rates by group, momentum for all of them."""
        if momentum is not None and self.wanted.optimizer != "SGD":
            raise RefusalError("INVALID_FIELD")
        for group, rate in rates.items():
            self._bases[group] = rate / self._share
        for torch_group in self._torch.param_groups:
            if momentum is not None:
                torch_group["momentum"] = momentum
        self.loss = loss or self.loss
        self.non_finite = non_finite or self.non_finite
        self.display_name = self.display_name if display_name is None else display_name
        self.changes += 1

    def evaluate(
        self, predictions: Tensor, targets: Tensor, split: Split.ValueType
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, and its gradient with respect to the predictions."""
        if self.loss is None:
            raise RefusalError("LOSS_NOT_SET")
        asked = predictions.clone().requires_grad_()
        loss = LOSSES[self.loss][1](asked, targets)
        (gradient,) = torch.autograd.grad(loss, asked)
        if split != SPLIT_UNSPECIFIED:
            point = Point(
                sequence=len(self._points) + 1,
                split=split,
                steps=self.steps,
                epochs=self.epochs,
                loss=loss.item(),
            )
            self._points.append(point)
            self.changes += 1
        return loss.detach(), gradient

    def points(self, split: Split.ValueType) -> tuple[list[Point], int]:
        """Return what is kept of the history, and how much is forgotten."""
        asked = [each for each in self._points if split in (SPLIT_UNSPECIFIED, each.split)]
        newest: dict[Split.ValueType, list[Point]] = {}
        for point in reversed(asked):
            newest.setdefault(point.split, []).append(point)
        kept = [point for points in newest.values() for point in points[:POINTS_MAX]]
        return sorted(kept, key=lambda point: point.sequence), len(asked) - len(kept)

    def view(self) -> View:
        """Return all that can be seen."""
        points, forgotten = self.points(SPLIT_UNSPECIFIED)
        groups = zip(GROUPS, self._torch.param_groups, strict=True)
        ready = not self.unset
        return View(
            state=SessionState.SESSION_STATE_READY
            if ready
            else SessionState.SESSION_STATE_AWAITING_PARAMETERS,
            steps=self.steps,
            epochs=self.epochs,
            rates=self.rates,
            display_name=self.display_name,
            momenta={name: group.get("momentum", 0.0) for name, group in groups},
            loss=self.loss,
            non_finite=self.non_finite,
            parameters={name: bytes_of(value) for name, value in self.values.items()}
            if ready
            else None,
            points=points,
            forgotten=forgotten,
            contributions=self.contributions,
        )

    def kept(self) -> Session:
        """Return what a snapshot keeps: all of it, but for what waits for other workers."""
        twin = copy.deepcopy(self)
        twin.round.clear()
        return twin

    @property
    def _share(self) -> float:
        """What the schedule has left of the rates."""
        if self.wanted.unit is None:
            return 1.0
        count = self.epochs if self.wanted.unit == EPOCHS_UNIT else self.steps
        return _GAMMA ** (count // _STEP_SIZE)

    def _step(self, brought: Sequence[tuple[Content, bytes]]) -> Outcome:
        """Make a step of what the workers have brought, in their order."""
        mean = {}
        for name in self.values:
            present = [content[name] for content, _ in brought if name in content]
            if present:
                mean[name] = functools.reduce(torch.add, present) / len(brought)
        if not mean:
            raise RefusalError("NO_GRADIENT")
        self._check_finite(mean)
        rates = self.rates
        for group, rate in zip(self._torch.param_groups, rates.values(), strict=True):
            group["lr"] = rate
        for name, value in self.values.items():
            value.grad = mean.get(name)
        self._torch.step()
        self.last = Outcome(
            step=self.steps + 1,
            epochs=self.epochs,
            rates=rates,
            norm=math.hypot(*(each.norm().item() for each in mean.values())),
            digests=[digest for _, digest in brought],
        )
        self.steps, self._epoch_steps = self.steps + 1, self._epoch_steps + 1
        self.changes += 1
        return self.last

    @staticmethod
    def _check_same(first: bytes, digest: bytes) -> None:
        """Make sure that what is sent again is what was sent first, as far as anybody can tell."""
        if first and digest and first != digest:
            raise RefusalError("STEP_CONFLICT")

    def _check_finite(self, content: Content) -> None:
        is_finite = all(gradient.isfinite().all() for gradient in content.values())
        if not is_finite and self.non_finite != NON_FINITE_POLICY_ALLOW:
            raise RefusalError("NON_FINITE_GRADIENT")
