"""What is compared: nine optimizers, each with a schedule.

The schedules are made for 20 epochs of 23 steps, 460 in all; half of them count the one, half the
other.
"""

from __future__ import annotations

from dataclasses import dataclass

from optserve_client import ScheduleUnit
from optserve_client.lr_scheduler import (
    AnyScheduler,
    ExponentialLR,
    LambdaLR,
    MultiStepLR,
    StepLR,
)
from optserve_client.optim import (
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AnyOptimizer,
    RMSprop,
)

EPOCHS = 20
BATCH = 64
WEIGHT_DECAY = 1e-4  # Of the weights; the biases have none.


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """An optimizer with its schedule."""

    name: str
    """As people call it."""
    optimizer: AnyOptimizer
    scheduler: AnyScheduler
    unit: ScheduleUnit
    """What the scheduler counts."""

    @property
    def schedule(self) -> str:
        """The schedule, and what it counts."""
        return f"{self.scheduler.DESCRIPTOR.name}, {self.unit}"


RECIPES = (
    Recipe(
        name="SGD",
        optimizer=SGD(lr=0.5),
        scheduler=StepLR(step_size=7, gamma=0.5),
        unit="epochs",
    ),
    Recipe(
        name="SGD with momentum",
        optimizer=SGD(lr=0.1, momentum=0.9),
        scheduler=MultiStepLR(milestones=[230, 370], gamma=0.3),
        unit="steps",
    ),
    Recipe(
        name="Nesterov",
        optimizer=SGD(lr=0.1, momentum=0.9, nesterov=True),
        scheduler=ExponentialLR(gamma=0.92),
        unit="epochs",
    ),
    Recipe(
        name="RMSprop",
        optimizer=RMSprop(lr=3e-3),
        scheduler=ExponentialLR(gamma=0.996),
        unit="steps",
    ),
    Recipe(
        name="Adadelta",
        optimizer=Adadelta(lr=2.0),
        scheduler=LambdaLR(lr_lambda="0.95 ** epoch"),
        unit="epochs",
    ),
    Recipe(
        name="Adagrad",
        optimizer=Adagrad(lr=0.05),
        scheduler=MultiStepLR(milestones=[10, 16], gamma=0.5),
        unit="epochs",
    ),
    Recipe(
        name="Adam",
        optimizer=Adam(lr=0.01),
        scheduler=StepLR(step_size=150, gamma=0.4),
        unit="steps",
    ),
    Recipe(
        name="AMSGrad",
        optimizer=Adam(lr=0.01, amsgrad=True),
        # A warm-up of two epochs times half a cosine. What is counted, here steps, is "epoch".
        scheduler=LambdaLR(lr_lambda="min(1, (epoch + 1) / 46) * (1 + cos(pi * epoch / 460)) / 2"),
        unit="steps",
    ),
    Recipe(
        name="Adamax",
        optimizer=Adamax(lr=0.02),
        scheduler=ExponentialLR(gamma=0.95),
        unit="epochs",
    ),
)
