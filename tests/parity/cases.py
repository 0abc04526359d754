"""The table of what is compared with torch: optimizers and schedulers, several settings of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from google.protobuf.message import Message

from optserve.v1 import optimizer_pb2, scheduler_pb2
from optserve.v1.optimizer_pb2 import Optimizer
from optserve.v1.scheduler_pb2 import Scheduler, ScheduleUnit

Arguments = Mapping[str, Any]

_Choice = TypeVar("_Choice", bound=Message)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerCase:
    """An optimizer with hyperparameters, and those in which a second group differs."""

    name: str
    kind: str
    """torch's name, which is the contract's too."""
    hyperparameters: Arguments
    own: Arguments

    @property
    def torch_class(self) -> type[torch.optim.Optimizer]:
        """Torch's own class."""
        found: type[torch.optim.Optimizer] = getattr(torch.optim, self.kind)
        return found

    def message(self, hyperparameters: Arguments) -> Optimizer:
        """Return the optimizer as a message."""
        return choose(Optimizer(), getattr(optimizer_pb2, self.kind)(**hyperparameters))


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerCase:
    """A scheduler, as a message and as torch has it."""

    name: str
    kind: str
    arguments: Arguments = field(default_factory=dict)
    unit: ScheduleUnit.ValueType = ScheduleUnit.SCHEDULE_UNIT_STEPS
    lambdas: Sequence[tuple[str, Callable[[int], float]]] = ()
    """For LambdaLR, one for all groups or one for each: as an expression, and in Python."""

    @property
    def counts_epochs(self) -> bool:
        """Whether the scheduler advances at the end of an epoch, not after each step."""
        return self.unit == ScheduleUnit.SCHEDULE_UNIT_EPOCHS

    def message(self, groups: int) -> Scheduler:
        """Return the scheduler of a session of so many groups as a message."""
        expressions = [expression for expression, _ in self.lambdas[:groups]]
        one = {"lr_lambda": expressions[0]} if len(self.lambdas) == 1 else {}
        each = {"group_lr_lambdas": expressions} if len(self.lambdas) > 1 else {}
        kind = getattr(scheduler_pb2, self.kind)(**self.arguments, **one, **each)
        scheduler = choose(Scheduler(), kind)
        scheduler.unit = self.unit
        return scheduler

    def build(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Return torch's own scheduler."""
        groups = len(optimizer.param_groups)
        functions = [function for _, function in self.lambdas[:groups]]
        lambdas = functions * groups if len(functions) == 1 else functions
        arguments = {"lr_lambda": lambdas} if lambdas else dict(self.arguments)
        torch_class = getattr(torch.optim.lr_scheduler, self.kind)
        scheduler: torch.optim.lr_scheduler.LRScheduler = torch_class(optimizer, **arguments)
        return scheduler


def choose(choice: _Choice, kind: Message) -> _Choice:
    """Set the arm of a oneof that has the type of ``kind``; return the message."""
    arms = choice.DESCRIPTOR.oneofs_by_name["kind"].fields
    name = next(arm.name for arm in arms if arm.message_type is kind.DESCRIPTOR)
    getattr(choice, name).CopyFrom(kind)
    getattr(choice, name).SetInParent()
    return choice


def _optimizer(
    name: str, kind: str, own: Arguments | None = None, /, **hyperparameters: object
) -> OptimizerCase:
    return OptimizerCase(
        name=name, kind=kind, hyperparameters=hyperparameters, own=own or {"lr": 0.03}
    )


OPTIMIZERS = (
    _optimizer("sgd", "SGD", lr=0.1),
    _optimizer("sgd-defaults", "SGD"),
    _optimizer("sgd-momentum", "SGD", {"lr": 0.02, "momentum": 0.5}, lr=0.1, momentum=0.9),
    _optimizer("sgd-dampening", "SGD", {"momentum": 0}, lr=0.1, momentum=0.9, dampening=0.3),
    _optimizer("sgd-nesterov", "SGD", {"nesterov": False}, lr=0.1, momentum=0.9, nesterov=True),
    _optimizer("sgd-decay", "SGD", {"weight_decay": 0}, lr=0.1, momentum=0.9, weight_decay=0.01),
    _optimizer("sgd-maximize", "SGD", {"maximize": False}, lr=0.1, weight_decay=0.1, maximize=True),
    _optimizer("sgd-unfused", "SGD", {"lr": 0.5}, lr=0.1, momentum=0.9, fused=False),
    _optimizer("sgd-foreach", "SGD", {"lr": 0.5}, lr=0.1, momentum=0.9, foreach=True),
    _optimizer("adam", "Adam", {"betas": (0.8, 0.9)}, lr=0.01),
    _optimizer("adam-defaults", "Adam"),
    _optimizer("adam-amsgrad", "Adam", {"eps": 1e-4}, lr=0.01, amsgrad=True),
    _optimizer("adam-decay", "Adam", {"weight_decay": 0.2}, lr=0.01, weight_decay=0.1),
    _optimizer("adam-decoupled", "Adam", lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    _optimizer("adam-maximize", "Adam", {"maximize": False}, lr=0.01, maximize=True, amsgrad=True),
    _optimizer("adam-unfused", "Adam", {"fused": True}, lr=0.01, betas=(0.5, 0.9), fused=False),
    _optimizer("adam-foreach", "Adam", {"foreach": False}, lr=0.01, foreach=True),
    _optimizer("adamw", "AdamW", {"weight_decay": 0}, lr=0.01),
    _optimizer("adamw-amsgrad", "AdamW", lr=0.01, weight_decay=0.2, amsgrad=True, eps=1e-6),
    _optimizer("adamw-unfused", "AdamW", lr=0.01, maximize=True, fused=False),
    _optimizer("rmsprop", "RMSprop", {"alpha": 0.5}, lr=0.01),
    _optimizer("rmsprop-momentum", "RMSprop", {"momentum": 0}, momentum=0.9, weight_decay=0.1),
    _optimizer("rmsprop-centered", "RMSprop", lr=0.01, centered=True, momentum=0.9, eps=1e-6),
    _optimizer("rmsprop-foreach", "RMSprop", lr=0.01, foreach=True, maximize=True),
    _optimizer("adadelta", "Adadelta", {"rho": 0.5}),
    _optimizer("adadelta-decay", "Adadelta", lr=0.5, weight_decay=0.1, eps=1e-4, maximize=True),
    _optimizer("adadelta-foreach", "Adadelta", lr=0.5, foreach=True),
    _optimizer("adagrad", "Adagrad", {"eps": 1e-4}, lr=0.1),
    _optimizer("adagrad-lr-decay", "Adagrad", {"lr_decay": 0}, lr=0.1, lr_decay=0.1),
    _optimizer("adagrad-initial", "Adagrad", initial_accumulator_value=0.5, weight_decay=0.1),
    _optimizer("adagrad-unfused", "Adagrad", lr=0.1, maximize=True, fused=False),
    _optimizer("adagrad-foreach", "Adagrad", lr=0.1, lr_decay=0.1, foreach=True),
    _optimizer("adamax", "Adamax", {"betas": (0.5, 0.9)}, lr=0.01),
    _optimizer("adamax-decay", "Adamax", lr=0.01, eps=1e-4, weight_decay=0.1, maximize=True),
    _optimizer("adamax-foreach", "Adamax", lr=0.01, foreach=True),
)

_EPOCHS = ScheduleUnit.SCHEDULE_UNIT_EPOCHS
_DECAY = ("0.95 ** epoch", lambda epoch: 0.95**epoch)
_INVERSE = ("1 / (1 + 0.1 * epoch)", lambda epoch: 1 / (1 + 0.1 * epoch))
_WARM_UP = (
    "(epoch + 1) / 10 if epoch < 10 else 0.5 * (1 + cos(pi * min(epoch, 50) / 50))",
    lambda epoch: (
        (epoch + 1) / 10 if epoch < 10 else 0.5 * (1 + math.cos(math.pi * min(epoch, 50) / 50))
    ),
)

SCHEDULERS = (
    None,
    SchedulerCase(name="step-lr", kind="StepLR", arguments={"step_size": 7, "gamma": 0.5}),
    SchedulerCase(name="step-lr-epochs", kind="StepLR", arguments={"step_size": 2}, unit=_EPOCHS),
    SchedulerCase(
        name="multi-step-lr",
        kind="MultiStepLR",
        arguments={"milestones": [30, 10, 10, 31], "gamma": 0.7},
    ),
    SchedulerCase(
        name="multi-step-lr-epochs",
        kind="MultiStepLR",
        arguments={"milestones": [1, 4]},
        unit=_EPOCHS,
    ),
    SchedulerCase(name="exponential-lr", kind="ExponentialLR", arguments={"gamma": 0.97}),
    SchedulerCase(
        name="exponential-lr-epochs",
        kind="ExponentialLR",
        arguments={"gamma": 0.8},
        unit=_EPOCHS,
    ),
    SchedulerCase(name="lambda-lr", kind="LambdaLR", lambdas=[_WARM_UP]),
    SchedulerCase(name="lambda-lr-epochs", kind="LambdaLR", lambdas=[_DECAY], unit=_EPOCHS),
    SchedulerCase(name="lambda-lr-groups", kind="LambdaLR", lambdas=[_INVERSE, _DECAY]),
)
