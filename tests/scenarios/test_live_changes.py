"""UpdateSession: what may change while a session runs, and what may not."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from drivers import Driver, take
from google.protobuf.message import Message
from messages import message_of
from parity.cases import SCHEDULERS, SchedulerCase, choose
from refusals import refused
from scenarios.models import B_GROUP, EPOCHS_UNIT, assert_same, create, gradients, model, spec

from optserve.v1.loss_pb2 import CrossEntropyLoss, L1Loss, Loss, MSELoss
from optserve.v1.optimizer_pb2 import SGD, Adagrad, Adam, Optimizer, RMSprop
from optserve.v1.optimizer_service_pb2 import UpdateSessionRequest
from optserve.v1.scheduler_pb2 import ExponentialLR
from optserve.v1.session_pb2 import NonFinitePolicy, ParameterGroup


def _change(
    session_id: str, kind: Message | None = None, **groups: Message
) -> UpdateSessionRequest:
    """Return the request that changes hyperparameters: of all groups, and of single ones."""
    return UpdateSessionRequest(
        session_id=session_id,
        optimizer=choose(Optimizer(), kind) if kind is not None else None,
        groups=[
            ParameterGroup(name=name, overrides=choose(Optimizer(), own))
            for name, own in groups.items()
        ],
    )


@pytest.mark.parametrize(
    "scheduler", SCHEDULERS, ids=[case.name if case else "no-schedule" for case in SCHEDULERS]
)
def test_a_new_rate_holds_for_the_next_step_and_the_schedule_goes_on_in_proportion(
    driver: Driver, scheduler: SchedulerCase | None
) -> None:
    """A session whose rate is multiplied by 4 in the middle is one that began with 4 times it."""
    wanted = spec(SGD(lr=0.5))
    if scheduler is not None:
        wanted.scheduler.CopyFrom(scheduler.message(1))
    plain, changed = create(driver, wanted), create(driver, wanted)
    rates: dict[str, list[float]] = {plain: [], changed: []}
    for session_id, seen in rates.items():
        with driver.worker(session_id) as worker:
            for step in range(1, 41):
                if step == 12 and session_id == changed:
                    rate = driver.get(session_id).status.rates[0].lr
                    session = driver.update(_change(session_id, SGD(lr=4 * rate)))
                    assert session.status.rates[0].lr == 4 * rate
                seen.append(take(worker, step, gradients(1)).rates["default"])
                if step % 5 == 0:
                    driver.end_epoch(session_id, step // 5)
    before, after = rates[plain][:11], [4 * rate for rate in rates[plain][11:]]
    assert rates[changed] == pytest.approx(before + after, rel=1e-12)
    assert rates[changed][11] == after[0]


def test_a_rate_of_zero_can_be_raised_again(driver: Driver) -> None:
    wanted = spec(SGD(lr=0), scheduler=ExponentialLR(gamma=0.5))
    session_id = create(driver, wanted)
    with driver.worker(session_id) as worker:
        assert take(worker, 1, gradients(1)).rates == {"default": 0}
        driver.update(_change(session_id, SGD(lr=1)))
        assert take(worker, 2, gradients(2)).rates == {"default": 1}
        assert take(worker, 3, gradients(3)).rates == {"default": 0.5}


def test_hyperparameters_change_for_all_groups_then_for_single_ones(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(lr=1), groups=[B_GROUP]))
    session = driver.update(_change(session_id, SGD(lr=2, weight_decay=0.5), bias=SGD(lr=3)))
    assert {rate.group: rate.lr for rate in session.status.rates} == {"default": 2, "bias": 3}
    in_force = [group.overrides.sgd for group in session.spec.groups]
    assert [(own.lr, own.weight_decay) for own in in_force] == [(2, 0.5), (3, 0.5)]
    assert driver.get(session_id).spec == session.spec
    with driver.worker(session_id) as worker:
        came = take(worker, 1, {"b": gradients(1)["b"]}).parameters["b"]
    wanted = model()["b"]
    wanted.grad = gradients(1)["b"]
    torch.optim.SGD([wanted], lr=3, weight_decay=0.5, fused=True).step()
    assert_same({"b": came}, {"b": wanted})


def test_momentum_may_begin_in_a_session_that_has_stepped(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(lr=0.5)))
    parameter = {"w": model()["w"]}
    optimizer = torch.optim.SGD(parameter.values(), lr=0.5, fused=True)
    before = driver.get(session_id).status.reserved_bytes
    with driver.worker(session_id) as worker:
        for step in range(1, 5):
            if step == 3:
                session = driver.update(_change(session_id, SGD(momentum=0.9)))
                optimizer.param_groups[0]["momentum"] = 0.9
                # A momentum takes as much memory as the parameters.
                assert session.status.reserved_bytes == before + 20 * 4
            gradient = {"w": gradients(step)["w"]}
            came = take(worker, step, gradient).parameters["w"]
            parameter["w"].grad = gradient["w"]
            optimizer.step()
            assert_same({"w": came}, parameter)


@pytest.mark.parametrize(
    ("begun", "changed"),
    [
        pytest.param(Adam(), Adam(amsgrad=True), id="adam-amsgrad"),
        pytest.param(RMSprop(), RMSprop(centered=True), id="rmsprop-centered"),
        pytest.param(RMSprop(), RMSprop(momentum=0.9), id="rmsprop-momentum"),
        pytest.param(
            Adagrad(), Adagrad(initial_accumulator_value=0.5), id="adagrad-initial-accumulator"
        ),
        pytest.param(SGD(momentum=0.9, dampening=0.5), SGD(nesterov=True), id="sgd-nesterov"),
        pytest.param(Adam(), Adam(foreach=True), id="adam-fused-and-foreach"),
    ],
)
def test_what_torch_keeps_no_state_for_is_refused_and_changes_nothing(
    driver: Driver, begun: Message, changed: Message
) -> None:
    session_id, other = create(driver, spec(begun)), create(driver, spec(begun))
    with driver.worker(session_id) as worker, driver.worker(other) as unchanged:
        take(worker, 1, gradients(1))
        take(unchanged, 1, gradients(1))
        before = driver.get(session_id)
        with refused("INVALID_HYPERPARAMETER"):
            driver.update(_change(session_id, changed))
        assert driver.get(session_id) == before
        came = take(worker, 2, gradients(2))
        assert_same(came.parameters, take(unchanged, 2, gradients(2)).parameters)


@pytest.mark.parametrize("lr", [-1.0, math.nan, math.inf], ids=str)
def test_a_rate_that_is_none_is_refused(driver: Driver, lr: float) -> None:
    session_id = create(driver, spec(SGD(lr=1)))
    with refused("INVALID_HYPERPARAMETER", field="optimizer.sgd.lr"):
        driver.update(_change(session_id, SGD(lr=lr)))
    assert driver.get(session_id).status.rates[0].lr == 1


def test_a_change_is_made_whole_or_not_at_all(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(lr=1), groups=[B_GROUP], loss=MSELoss()))
    before = driver.get(session_id)
    request = _change(session_id, SGD(lr=2), bias=SGD(lr=-3))
    request.display_name = "renamed"
    request.loss.l1_loss.SetInParent()
    with refused("INVALID_HYPERPARAMETER", field="groups[0].overrides.sgd.lr"):
        driver.update(request)
    assert driver.get(session_id) == before


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        pytest.param(_change("", Adam(lr=1)), "INVALID_FIELD", "optimizer", id="other-kind"),
        pytest.param(_change("", head=SGD(lr=1)), "UNKNOWN_NAME", "groups[0].name", id="no-group"),
        pytest.param(
            UpdateSessionRequest(groups=[B_GROUP]),
            "INVALID_FIELD",
            "groups[0].parameters",
            id="parameters-move",
        ),
        pytest.param(
            UpdateSessionRequest(loss=Loss()), "MISSING_FIELD", "loss", id="loss-of-no-kind"
        ),
        pytest.param(
            UpdateSessionRequest(display_name="\x00"), "INVALID_NAME", "display_name", id="name"
        ),
    ],
)
def test_what_cannot_change_is_refused(
    driver: Driver, request_: UpdateSessionRequest, reason: str, field: str
) -> None:
    session_id = create(driver, spec(SGD(lr=1), groups=[B_GROUP]))
    before = driver.get(session_id)
    request = UpdateSessionRequest.FromString(request_.SerializeToString())
    request.session_id = session_id
    with refused(reason, field=field):
        driver.update(request)
    assert driver.get(session_id) == before


def test_name_policy_and_loss_can_change(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(lr=1), loss=MSELoss()))
    request = UpdateSessionRequest(
        session_id=session_id,
        display_name="digits",
        non_finite=NonFinitePolicy.NON_FINITE_POLICY_ALLOW,
        loss=Loss(l1_loss=L1Loss()),
    )
    session = driver.update(request)
    assert session.status.display_name == session.spec.display_name == "digits"
    assert session.spec.loss.WhichOneof("kind") == "l1_loss"
    three, one = torch.tensor([3.0]), torch.tensor([1.0])
    assert driver.evaluate(session_id, three, one).result.loss == 2
    with driver.worker(session_id) as worker:
        assert take(worker, 1, {"b": torch.full((5,), math.inf)}).result.step == 1
    unchanged = driver.update(UpdateSessionRequest(session_id=session_id))
    assert unchanged.spec == session.spec


def test_a_loss_whose_weight_does_not_fit_is_told_of_when_it_is_set(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(), loss=MSELoss()))
    weight = message_of(torch.ones(2, 2))
    loss = Loss(cross_entropy_loss=CrossEntropyLoss(weight=weight))
    with refused("SHAPE_MISMATCH", field="loss.weight"):
        driver.update(UpdateSessionRequest(session_id=session_id, loss=loss))
    assert driver.get(session_id).spec.loss.WhichOneof("kind") == "mse_loss"


def test_changes_at_the_same_time_are_all_kept(driver: Driver) -> None:
    session_id = create(
        driver, spec(SGD(lr=1), scheduler=ExponentialLR(gamma=0.5), unit=EPOCHS_UNIT)
    )
    changes: list[Message] = [
        SGD(lr=0.25),
        SGD(momentum=0.5),
        SGD(dampening=0.25),
        SGD(weight_decay=0.125),
        SGD(maximize=True),
    ]
    with ThreadPoolExecutor(len(changes)) as pool:
        for _ in range(5):
            done = pool.map(lambda kind: driver.update(_change(session_id, kind)), changes)
            assert len(list(done)) == len(changes)
    in_force = driver.get(session_id).spec.groups[0].overrides.sgd
    for change in changes:
        for field, value in change.ListFields():
            assert getattr(in_force, field.name) == value
