"""A small model, and sessions of it."""

from __future__ import annotations

import torch
from drivers import Driver, Tensors
from google.protobuf.message import Message
from messages import bytes_of, headers_of
from parity.cases import choose
from torch import Tensor

from optserve.v1.loss_pb2 import Loss
from optserve.v1.optimizer_pb2 import Optimizer
from optserve.v1.scheduler_pb2 import Scheduler, ScheduleUnit
from optserve.v1.session_pb2 import ParameterGroup, SessionSpec

B_GROUP = ParameterGroup(name="bias", parameters=["b"])

STEPS_UNIT = ScheduleUnit.SCHEDULE_UNIT_STEPS
EPOCHS_UNIT = ScheduleUnit.SCHEDULE_UNIT_EPOCHS


def model(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return two parameters, the same each time."""
    generator = torch.Generator().manual_seed(11)
    return {
        "w": torch.randn(3, 5, generator=generator).to(dtype),
        "b": torch.randn(5, generator=generator).to(dtype),
    }


def gradients(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return gradients for the model, the same each time for the same seed."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        "w": torch.randn(3, 5, generator=generator).to(dtype),
        "b": torch.randn(5, generator=generator).to(dtype),
    }


def spec(
    kind: Message,
    *,
    parameters: Tensors | None = None,
    groups: list[ParameterGroup] | None = None,
    scheduler: Message | None = None,
    unit: ScheduleUnit.ValueType = STEPS_UNIT,
    loss: Message | None = None,
    workers: int = 0,
) -> SessionSpec:
    """Return the spec of a session: of the model, unless other parameters are given."""
    message = SessionSpec(
        parameters=headers_of(model() if parameters is None else parameters),
        optimizer=choose(Optimizer(), kind),
        groups=groups or [],
        loss=choose(Loss(), loss) if loss is not None else None,
        workers=workers,
    )
    if scheduler is not None:
        message.scheduler.CopyFrom(choose(Scheduler(), scheduler))
        message.scheduler.unit = unit
    return message


def create(driver: Driver, spec_: SessionSpec, values: Tensors | None = None) -> str:
    """Create a session with values, those of the model unless others are given; return its id."""
    session = driver.create(spec_, model() if values is None else values)
    return session.status.session_id


def assert_same(actual: Tensors, expected: Tensors) -> None:
    """Compare tensors, bit for bit."""
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape
        assert bytes_of(actual[name]) == bytes_of(tensor), name
