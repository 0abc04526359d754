"""Groups of parameters, and what a session answers to be in force."""

from __future__ import annotations

import inspect

import pytest
import torch
from drivers import Driver, take
from google.protobuf.message import Message
from messages import message_of
from parity.cases import OPTIMIZERS, OptimizerCase
from refusals import refused
from scenarios.models import assert_same, create, gradients, model, spec

from optserve.v1.loss_pb2 import BCELoss, CrossEntropyLoss, Reduction
from optserve.v1.optimizer_pb2 import SGD, Adagrad, Adam, Optimizer
from optserve.v1.scheduler_pb2 import LambdaLR, MultiStepLR, ScheduleUnit, StepLR
from optserve.v1.session_pb2 import NonFinitePolicy, ParameterGroup, SessionSpec

_NOT_OFFERED = {"params", "capturable", "differentiable"}


def _group(name: str, *parameters: str, kind: SGD | Adam | Adagrad | None = None) -> ParameterGroup:
    overrides = Optimizer(
        sgd=kind if isinstance(kind, SGD) else None,
        adam=kind if isinstance(kind, Adam) else None,
        adagrad=kind if isinstance(kind, Adagrad) else None,
    )
    return ParameterGroup(
        name=name, parameters=parameters, overrides=overrides if kind is not None else None
    )


def test_each_group_steps_with_its_own_hyperparameters(driver: Driver) -> None:
    groups = [_group("slow", "b", kind=SGD(lr=0.25))]
    session_id = create(driver, spec(SGD(lr=1), groups=groups))
    with driver.worker(session_id) as worker:
        answer = take(worker, 1, gradients(1))
    assert answer.rates == {"default": 1.0, "slow": 0.25}
    expected = {
        "w": model()["w"] - gradients(1)["w"],
        "b": model()["b"] - 0.25 * gradients(1)["b"],
    }
    assert_same(answer.parameters, expected)


def test_the_default_group_comes_first_and_may_have_hyperparameters_of_its_own(
    driver: Driver,
) -> None:
    groups = [
        _group("bias", "b", kind=SGD(lr=3)),
        _group("default", kind=SGD(lr=2, momentum=0.5)),
    ]
    session = driver.create(spec(SGD(lr=1), groups=groups), model())
    assert [(g.name, list(g.parameters)) for g in session.spec.groups] == [
        ("default", ["w"]),
        ("bias", ["b"]),
    ]
    assert [(rate.group, rate.lr) for rate in session.status.rates] == [("default", 2), ("bias", 3)]
    assert [g.overrides.sgd.momentum for g in session.spec.groups] == [0.5, 0]
    assert session.spec.optimizer.sgd.lr == 1


def test_there_is_no_default_group_where_every_parameter_is_in_another(driver: Driver) -> None:
    groups = [_group("two", "b"), _group("one", "w", kind=SGD(lr=2))]
    session = driver.create(spec(SGD(lr=1), groups=groups), model())
    assert [group.name for group in session.spec.groups] == ["two", "one"]
    with driver.worker(session.status.session_id) as worker:
        assert take(worker, 1, gradients(1)).rates == {"two": 1.0, "one": 2.0}


def test_a_group_may_choose_another_way_of_computing(driver: Driver) -> None:
    groups = [_group("plain", "b", kind=Adam(foreach=True))]
    session = driver.create(spec(Adam(lr=0.1), groups=groups), model())
    fused, plain = (group.overrides.adam for group in session.spec.groups)
    assert fused.fused
    assert not fused.HasField("foreach")
    assert plain.foreach
    assert not plain.HasField("fused")
    with driver.worker(session.status.session_id) as worker:
        for step in range(1, 11):  # Until the two ways have rounded differently.
            came = take(worker, step, gradients(step)).parameters["b"]
    assert_same({"b": came}, {"b": _trained(foreach=True)})
    assert not torch.equal(came, _trained(fused=True))


def _trained(*, fused: bool | None = None, foreach: bool | None = None) -> torch.Tensor:
    parameter = model()["b"]
    optimizer = torch.optim.Adam([parameter], lr=0.1, fused=fused, foreach=foreach)
    for step in range(1, 11):
        parameter.grad = gradients(step)["b"]
        optimizer.step()
    return parameter


@pytest.mark.parametrize("case", OPTIMIZERS, ids=[case.name for case in OPTIMIZERS])
def test_a_session_answers_with_every_hyperparameter_in_force(
    driver: Driver, case: OptimizerCase
) -> None:
    session = driver.create(spec(getattr(case.message(case.hyperparameters), _arm(case))))
    driver.delete(session.status.session_id)
    wanted = {
        name: parameter.default
        for name, parameter in inspect.signature(case.torch_class).parameters.items()
        if name not in _NOT_OFFERED
    }
    if "fused" in wanted and not case.hyperparameters.get("foreach"):
        wanted["fused"] = True
    wanted |= case.hyperparameters
    wanted = {name: value for name, value in wanted.items() if value is not None}
    in_force = session.spec.optimizer
    assert _fields(getattr(in_force, _arm(case))) == wanted
    assert [group.overrides for group in session.spec.groups] == [in_force]


def test_a_session_answers_with_everything_else_in_force(driver: Driver) -> None:
    wanted = spec(
        SGD(),
        scheduler=StepLR(step_size=3),
        unit=ScheduleUnit.SCHEDULE_UNIT_UNSPECIFIED,
        loss=CrossEntropyLoss(),
    )
    session = driver.create(wanted, model())
    in_force = session.spec
    assert in_force.scheduler.unit == ScheduleUnit.SCHEDULE_UNIT_STEPS
    assert _fields(in_force.scheduler.step_lr) == {"step_size": 3, "gamma": 0.1}
    loss = in_force.loss.cross_entropy_loss
    assert (loss.ignore_index, loss.label_smoothing) == (-100, 0)
    assert loss.reduction == Reduction.REDUCTION_MEAN
    assert not loss.HasField("weight")
    assert in_force.workers == session.status.workers == 1
    assert in_force.non_finite == NonFinitePolicy.NON_FINITE_POLICY_REFUSE
    assert in_force.limits.loss_points_max == 10_000
    assert in_force.limits.round_timeout_s == 600
    assert session.status.optimizer == "SGD"
    assert session.status.parameter_count == 20
    assert session.status.device == "cpu"
    assert session.status.reserved_bytes > 0
    assert len(session.status.session_id) == 32
    assert driver.get(session.status.session_id) == session


def test_a_spec_that_was_answered_makes_the_same_session_again(driver: Driver) -> None:
    weight = torch.rand(3, 5)
    from_scratch = spec(
        Adam(lr=0.5, betas=[0.5, 0.75]),
        groups=[_group("b", "b", kind=Adam(eps=0.5))],
        scheduler=MultiStepLR(milestones=[4, 2]),
        loss=BCELoss(weight=message_of(weight)),
    )
    first = driver.create(from_scratch).spec
    again = SessionSpec.FromString(first.SerializeToString())
    del again.groups[0].parameters[:]  # The default group takes what is left: it names none.
    assert driver.create(again).spec == first


def test_two_groups_may_each_have_an_expression(driver: Driver) -> None:
    scheduler = LambdaLR(group_lr_lambdas=["1 / (epoch + 1)", "0.5 ** epoch"])
    wanted = spec(SGD(lr=1), groups=[_group("b", "b", kind=SGD(lr=8))], scheduler=scheduler)
    session_id = create(driver, wanted)
    with driver.worker(session_id) as worker:
        rates = [take(worker, step, gradients(step)).rates for step in (1, 2, 3)]
    assert rates == [
        {"default": 1, "b": 8},
        {"default": 1 / 2, "b": 4},
        {"default": 1 / 3, "b": 2},
    ]


def test_a_hyperparameter_that_torch_reads_once_cannot_differ_between_groups(
    driver: Driver,
) -> None:
    groups = [_group("b", "b", kind=Adagrad(initial_accumulator_value=0.5))]
    with refused(
        "INVALID_HYPERPARAMETER", field="spec.groups[0].overrides.initial_accumulator_value"
    ):
        driver.create(spec(Adagrad(), groups=groups))


def _arm(case: OptimizerCase) -> str:
    return str(case.message({}).WhichOneof("kind"))


def _fields(message: Message) -> dict[str, object]:
    """Return the fields that are set, repeated ones as torch has them."""
    return {
        field.name: tuple(value) if field.is_repeated else value
        for field, value in message.ListFields()
    }
