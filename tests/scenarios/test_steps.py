"""What a step does, and what it leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from drivers import Driver, take
from refusals import refused
from scenarios.models import assert_same, create, gradients, model, spec
from torch import Tensor

from optserve.v1.optimizer_pb2 import SGD, Adagrad, Adam
from optserve.v1.session_pb2 import NonFinitePolicy, SessionState


def test_a_trajectory_is_that_of_torch_and_its_numbers_are_told(driver: Driver) -> None:
    session_id = create(driver, spec(Adam(lr=0.1)))
    parameters = model()
    optimizer = torch.optim.Adam(parameters.values(), lr=0.1, fused=True)
    with driver.worker(session_id) as worker:
        assert worker.status.state == SessionState.SESSION_STATE_READY
        assert worker.status.steps == 0
        for step in range(1, 6):
            answer = take(worker, step, gradients(step))
            for name, gradient in gradients(step).items():
                parameters[name].grad = gradient
            optimizer.step()
            assert_same(answer.parameters, parameters)
            assert answer.result.step == step
            assert answer.rates == {"default": 0.1}
            assert not answer.result.replayed
            flat = torch.cat([gradient.flatten() for gradient in gradients(step).values()])
            assert math.isclose(answer.result.gradient_norm, flat.norm().item(), rel_tol=1e-6)
    status = driver.get(session_id).status
    assert (status.steps, status.epochs) == (5, 0)
    assert_same(driver.download(session_id), parameters)


def test_an_absent_gradient_is_not_a_gradient_of_zeros(driver: Driver) -> None:
    absent, zero = create(driver, spec(Adam(lr=0.1))), create(driver, spec(Adam(lr=0.1)))
    with driver.worker(absent) as without, driver.worker(zero) as with_zeros:
        before = take(without, 1, gradients(1)).parameters["b"]
        take(with_zeros, 1, gradients(1))
        second = gradients(2)
        stays = take(without, 2, {"w": second["w"]}).parameters["b"]
        moves = take(with_zeros, 2, {"w": second["w"], "b": torch.zeros(5)}).parameters["b"]
        assert torch.equal(stays, before)
        assert not torch.equal(moves, before)  # Adam's momentum goes on.
        third = take(without, 3, gradients(3)).parameters["b"]
    # The state of the parameter stayed too: it never saw the second step.
    parameter = model()["b"]
    optimizer = torch.optim.Adam([parameter], lr=0.1, fused=True)
    for step in (1, 3):
        parameter.grad = gradients(step)["b"]
        optimizer.step()
    assert_same({"b": third}, {"b": parameter})


def test_a_first_gradient_may_come_late(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(lr=0.5, momentum=0.9)))
    with driver.worker(session_id) as worker:
        take(worker, 1, {"w": gradients(1)["w"]})
        late = take(worker, 2, gradients(2)).parameters["b"]
    assert_same({"b": late}, {"b": model()["b"] - 0.5 * gradients(2)["b"]})


@pytest.mark.parametrize("kind", [SGD(lr=0.5, momentum=0.9), Adam(lr=0.5), Adagrad(lr=0.5)])
def test_scalars_and_tensors_of_no_element_step_like_others(
    driver: Driver, kind: SGD | Adam | Adagrad
) -> None:
    values: dict[str, Tensor] = {
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0),
        "flat": torch.zeros(3, 0, 2),
        "deep": torch.ones((1,) * 16),
    }
    session_id = create(driver, spec(kind, parameters=values), values)
    with driver.worker(session_id) as worker:
        for step in (1, 2):
            came = take(worker, step, {name: torch.ones_like(v) for name, v in values.items()})
    assert {name: value.shape for name, value in came.parameters.items()} == {
        name: value.shape for name, value in values.items()
    }
    assert came.parameters["scalar"] < 2
    assert came.parameters["scalar"] == came.parameters["deep"] + 1


def test_a_session_of_nothing_but_tensors_of_no_element_steps(driver: Driver) -> None:
    values = {"empty": torch.zeros(0, 7)}
    session_id = create(driver, spec(SGD(), parameters=values), values)
    with driver.worker(session_id) as worker:
        assert take(worker, 1, values).result.gradient_norm == 0
        assert take(worker, 2, values).result.step == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_data_types_stay_what_they_are(driver: Driver, dtype: torch.dtype) -> None:
    session_id = create(driver, spec(SGD(lr=0.5), parameters=model(dtype)), model(dtype))
    with driver.worker(session_id) as worker:
        came = take(worker, 1, gradients(1, dtype)).parameters
    expected = {
        name: value - 0.5 * gradients(1, dtype)[name] for name, value in model(dtype).items()
    }
    assert_same(came, expected)


def test_one_session_may_mix_data_types(driver: Driver) -> None:
    values = {"half": model(torch.float16)["w"], "double": model(torch.float64)["b"]}
    session_id = create(driver, spec(Adam(), parameters=values), values)
    with driver.worker(session_id) as worker:
        came = take(worker, 1, {name: torch.ones_like(value) for name, value in values.items()})
    assert {name: v.dtype for name, v in came.parameters.items()} == {
        "half": torch.float16,
        "double": torch.float64,
    }


def test_the_last_step_is_answered_again_and_applied_once(driver: Driver) -> None:
    session_id = create(driver, spec(Adam(lr=0.1)))
    with driver.worker(session_id) as worker:
        take(worker, 1, gradients(1))
        second = take(worker, 2, gradients(2))
        again = take(worker, 2, gradients(7))  # Whatever comes with it.
    with driver.worker(session_id) as worker:
        assert worker.status.steps == 2
        once_more = take(worker, 2, {})
        for repeated in (again, once_more):
            assert repeated.result.replayed
            assert_same(repeated.parameters, second.parameters)
            assert repeated.rates == second.rates
            assert repeated.result.gradient_norm == second.result.gradient_norm
        assert take(worker, 3, gradients(3)).result.step == 3


@pytest.mark.parametrize("step", [0, 1, 4, 2**63])
def test_a_step_out_of_turn_is_refused_with_the_number_that_is_expected(
    driver: Driver, step: int
) -> None:
    session_id = create(driver, spec(SGD()))
    with driver.worker(session_id) as worker:
        take(worker, 1, gradients(1))
        before = take(worker, 2, gradients(2)).parameters
        with refused("STEP_OUT_OF_ORDER", field="step") as caught:
            take(worker, step, gradients(3))
        assert caught.value.expected == "3"
    assert driver.get(session_id).status.steps == 2
    assert_same(driver.download(session_id), before)


def test_a_good_step_follows_a_refused_one_on_the_same_stream(driver: Driver) -> None:
    session_id, plain = create(driver, spec(Adam())), create(driver, spec(Adam()))
    poison = gradients(2)
    poison["b"][3] = math.nan
    mistakes = {
        "UNKNOWN_NAME": {"v": torch.zeros(3)},
        "SHAPE_MISMATCH": {"w": torch.zeros(5, 3)},
        "DATA_TYPE_MISMATCH": {"w": torch.zeros(3, 5, dtype=torch.float64)},
        "NON_FINITE_GRADIENT": poison,
        "NO_GRADIENT": {},
    }
    with driver.worker(session_id) as worker, driver.worker(plain) as other:
        take(worker, 1, gradients(1))
        for reason, mistaken in mistakes.items():
            with refused(reason):
                take(worker, 2, mistaken)
        came = take(worker, 2, gradients(2))
        take(other, 1, gradients(1))
        assert_same(came.parameters, take(other, 2, gradients(2)).parameters)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_gradient_that_is_not_finite_is_applied_if_the_session_allows_it(
    driver: Driver, value: float
) -> None:
    wanted = spec(SGD(lr=1))
    wanted.non_finite = NonFinitePolicy.NON_FINITE_POLICY_ALLOW
    session_id = create(driver, wanted)
    gradient = torch.full((5,), value)
    with driver.worker(session_id) as worker:
        came = take(worker, 1, {"b": gradient})
    assert_same({"b": came.parameters["b"]}, {"b": model()["b"] - gradient})


def test_a_finite_gradient_whose_norm_overflows_is_no_mistake(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(lr=0)))
    with driver.worker(session_id) as worker:
        answer = take(worker, 1, {"w": torch.full((3, 5), 3e38)})
    assert answer.result.step == 1


def test_a_session_steps_once_every_parameter_has_a_value(driver: Driver) -> None:
    session_id = driver.create(spec(SGD(lr=1))).status.session_id
    with driver.worker(session_id) as worker:
        assert worker.status.state == SessionState.SESSION_STATE_AWAITING_PARAMETERS
        with refused("PARAMETERS_NOT_SET", field="parameters") as caught:
            take(worker, 1, gradients(1))
        assert "w, b" in caught.value.message
        status = driver.upload(session_id, {"w": model()["w"]})
        assert status.state == SessionState.SESSION_STATE_AWAITING_PARAMETERS
        with refused("PARAMETERS_NOT_SET"):
            take(worker, 1, gradients(1))
        with refused("PARAMETERS_NOT_SET"):
            driver.download(session_id)
        status = driver.upload(session_id, {"b": model()["b"]})
        assert status.state == SessionState.SESSION_STATE_READY
        assert take(worker, 1, gradients(1)).result.step == 1


def test_parameters_can_be_set_and_read_between_steps(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(lr=1)))
    with driver.worker(session_id) as worker:
        take(worker, 1, gradients(1))
        driver.upload(session_id, {"b": torch.zeros(5)})
        assert_same(driver.download(session_id, ["b"]), {"b": torch.zeros(5)})
        after = take(worker, 2, {"b": torch.ones(5)}).parameters
    assert_same({"b": after["b"]}, {"b": -torch.ones(5)})
    assert list(driver.download(session_id, ["b", "w"])) == ["b", "w"]
