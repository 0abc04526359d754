"""Some steps of a model, through a session and by torch alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from drivers import Driver, take
from messages import bytes_of, headers_of
from parity.cases import OptimizerCase, SchedulerCase
from torch import Tensor

from optserve.v1.session_pb2 import ParameterGroup, Session, SessionSpec

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Course:
    """A model, and how many steps it takes."""

    steps: int
    epoch_steps: int
    """No divisor of the steps, so that the last epoch is not full."""
    shapes: Shapes
    head: tuple[str, ...]
    """The second group."""
    gaps: bool
    """Whether now and then, also at first, a gradient is absent."""


SMALL = Course(
    steps=50,
    epoch_steps=8,
    shapes={
        "scale": (),
        "layer.weight": (7, 9),
        "layer.bias": (9,),
        "empty": (0, 3),
        "head.weight": (33, 3),
        "head.bias": (1,),
        "one": (1, 1, 1),
    },
    head=("head.weight", "head.bias", "one"),
    gaps=True,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """Where a run has led, step by step."""

    rates: list[dict[str, float]]
    parameters: list[dict[str, Tensor]]


def initial_parameters(
    dtype: torch.dtype = torch.float32, course: Course = SMALL
) -> dict[str, Tensor]:
    """Return the same values each time."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in course.shapes.items()
    }


@functools.cache
def gradients_of_steps(
    dtype: torch.dtype = torch.float32, course: Course = SMALL
) -> list[dict[str, Tensor]]:
    """Return the same gradients each time."""
    generator = torch.Generator().manual_seed(2)
    return [
        {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for position, (name, shape) in enumerate(course.shapes.items())
            if not course.gaps or (step + position) % 5 != 0
        }
        for step in range(1, course.steps + 1)
    ]


def spec_of(
    optimizer: OptimizerCase,
    scheduler: SchedulerCase | None,
    groups: int,
    dtype: torch.dtype = torch.float32,
    course: Course = SMALL,
) -> SessionSpec:
    """Return the spec of a session with one group, or with two."""
    own = optimizer.message(optimizer.own)
    head = ParameterGroup(name="head", parameters=course.head, overrides=own)
    return SessionSpec(
        parameters=headers_of(initial_parameters(dtype, course)),
        optimizer=optimizer.message(optimizer.hyperparameters),
        groups=[head] if groups == 2 else [],
        scheduler=scheduler.message(groups) if scheduler else None,
    )


def served(
    driver: Driver,
    session: Session,
    scheduler: SchedulerCase | None,
    dtype: torch.dtype = torch.float32,
    course: Course = SMALL,
) -> Trajectory:
    """Take the steps through a session."""
    session_id = session.status.session_id
    rates, parameters = [], []
    with driver.worker(session_id) as worker:
        for step, gradients in enumerate(gradients_of_steps(dtype, course), start=1):
            answer = take(worker, step, gradients)
            rates.append(answer.rates)
            parameters.append(answer.parameters)
            if scheduler and scheduler.counts_epochs and step % course.epoch_steps == 0:
                driver.end_epoch(session_id, step // course.epoch_steps)
    return Trajectory(rates=rates, parameters=parameters)


def local(
    optimizer: OptimizerCase,
    scheduler: SchedulerCase | None,
    hyperparameters: Mapping[str, Mapping[str, Any]],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    course: Course = SMALL,
) -> Trajectory:
    """Take the same steps with torch alone.

    Args:
        optimizer: Which class to use.
        scheduler: Which one to build over it.
        hyperparameters: Of each group, by its name.
        dtype: Of parameters and gradients.
        device: Where they live; what is returned lives on the CPU.
        course: Which model, and how many steps.
    """
    model = {name: value.to(device) for name, value in initial_parameters(dtype, course).items()}
    members = {
        "default": [name for name in model if name not in course.head],
        "head": list(course.head),
    }
    if "head" not in hyperparameters:
        members["default"] = list(model)
    torch_optimizer = optimizer.torch_class(
        [
            {"params": [model[name] for name in members[group]], **own}
            for group, own in hyperparameters.items()
        ],
        **hyperparameters["default"],
    )
    torch_scheduler = scheduler.build(torch_optimizer) if scheduler else None
    rates, parameters = [], []
    for step, gradients in enumerate(gradients_of_steps(dtype, course), start=1):
        rates.append(
            dict(zip(hyperparameters, [g["lr"] for g in torch_optimizer.param_groups], strict=True))
        )
        _step(torch_optimizer, model, gradients)
        parameters.append({name: value.clone().cpu() for name, value in model.items()})
        if (
            torch_scheduler
            and scheduler
            and (not scheduler.counts_epochs or step % course.epoch_steps == 0)
        ):
            torch_scheduler.step()
    return Trajectory(rates=rates, parameters=parameters)


def hyperparameters_of(optimizer: OptimizerCase, session: Session) -> dict[str, dict[str, Any]]:
    """Return what torch gets for each group: what was asked for, fused as the session says."""
    found: dict[str, dict[str, Any]] = {}
    for group in session.spec.groups:
        own = optimizer.own if group.name == "head" else {}
        found[group.name] = {**optimizer.hyperparameters, **own}
        in_force = getattr(group.overrides, str(group.overrides.WhichOneof("kind")))
        if "fused" in in_force.DESCRIPTOR.fields_by_name and in_force.HasField("fused"):
            found[group.name]["fused"] = in_force.fused
    return found


def assert_same_bits(actual: Trajectory, expected: Trajectory) -> None:
    """Compare two runs, step by step, so that a failure names the first difference."""
    assert actual.rates == expected.rates
    for step, (came, wanted) in enumerate(
        zip(actual.parameters, expected.parameters, strict=True), start=1
    ):
        assert list(came) == list(wanted)
        for name, tensor in wanted.items():
            assert bytes_of(came[name]) == bytes_of(tensor), f"{name} differs after step {step}"


def _step(
    optimizer: torch.optim.Optimizer, model: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> None:
    """Take one step; where torch's fused SGD cannot take all parameters at once, one by one.

    It raises a TypeError if some have a momentum and others get their first gradient.
    """
    one_by_one = isinstance(optimizer, torch.optim.SGD)
    for names in ([name] for name in model) if one_by_one else [list(model)]:
        for name, parameter in model.items():
            present = name in names and name in gradients
            parameter.grad = gradients[name].clone().to(parameter.device) if present else None
        optimizer.step()
