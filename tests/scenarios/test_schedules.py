"""Schedules: what counts, when it counts, and where it ends."""

from __future__ import annotations

import pytest
import torch
from drivers import Driver, take
from refusals import refused
from scenarios.models import EPOCHS_UNIT, assert_same, create, gradients, spec

from optserve.v1.optimizer_pb2 import SGD
from optserve.v1.optimizer_service_pb2 import UpdateSessionRequest
from optserve.v1.scheduler_pb2 import ExponentialLR, LambdaLR, StepLR


def _rate(driver: Driver, session_id: str) -> float:
    (rate,) = driver.get(session_id).status.rates
    return rate.lr


def test_a_schedule_counts_steps_unless_it_is_told_otherwise(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(lr=1), scheduler=StepLR(step_size=2, gamma=0.5)))
    with driver.worker(session_id) as worker:
        rates = [take(worker, step, gradients(step)).rates["default"] for step in range(1, 6)]
        driver.end_epoch(session_id, 1)
        rates.append(take(worker, 6, gradients(6)).rates["default"])
    assert rates == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert _rate(driver, session_id) == 0.125


def test_a_schedule_of_epochs_advances_only_at_the_end_of_one(driver: Driver) -> None:
    scheduler = ExponentialLR(gamma=0.5)
    session_id = create(driver, spec(SGD(lr=1), scheduler=scheduler, unit=EPOCHS_UNIT))
    rates = []
    with driver.worker(session_id) as worker:
        for step in range(1, 7):
            answer = take(worker, step, gradients(step))
            rates.append((answer.rates["default"], answer.result.epochs))
            if step % 2 == 0:
                status = driver.end_epoch(session_id, step // 2)
                assert status.epochs == step // 2
                assert status.rates[0].lr == 0.5 ** (step // 2)
    assert rates == [(1, 0), (1, 0), (0.5, 1), (0.5, 1), (0.25, 2), (0.25, 2)]


def test_an_epoch_ends_once_however_often_it_is_ended(driver: Driver) -> None:
    scheduler = ExponentialLR(gamma=0.5)
    session_id = create(driver, spec(SGD(lr=1), scheduler=scheduler, unit=EPOCHS_UNIT))
    with driver.worker(session_id) as worker:
        take(worker, 1, gradients(1))
    first = driver.end_epoch(session_id, 1)
    assert driver.end_epoch(session_id, 1) == first
    assert (first.epochs, first.rates[0].lr) == (1, 0.5)


@pytest.mark.parametrize("epoch", [0, 3, 2**63])
def test_an_epoch_out_of_turn_is_refused_with_the_number_that_is_expected(
    driver: Driver, epoch: int
) -> None:
    session_id = create(driver, spec(SGD()))
    with driver.worker(session_id) as worker:
        take(worker, 1, gradients(1))
        driver.end_epoch(session_id, 1)
        take(worker, 2, gradients(2))
    with refused("EPOCH_OUT_OF_ORDER", field="epoch") as caught:
        driver.end_epoch(session_id, epoch)
    assert caught.value.expected == "2"
    assert driver.get(session_id).status.epochs == 1


def test_an_epoch_without_a_step_does_not_end(driver: Driver) -> None:
    session_id = create(driver, spec(SGD()))
    with refused("EPOCH_EMPTY", field="epoch"):
        driver.end_epoch(session_id, 1)
    with driver.worker(session_id) as worker:
        take(worker, 1, gradients(1))
    driver.end_epoch(session_id, 1)
    with refused("EPOCH_EMPTY"):
        driver.end_epoch(session_id, 2)
    assert driver.get(session_id).status.epochs == 1


def test_a_schedule_that_comes_to_its_end_refuses_the_step_and_changes_nothing(
    driver: Driver,
) -> None:
    scheduler = LambdaLR(lr_lambda="sqrt(2 - epoch)")  # Has no value for 3.
    session_id = create(driver, spec(SGD(lr=1), scheduler=scheduler))
    with driver.worker(session_id) as worker:
        take(worker, 1, gradients(1))
        before = take(worker, 2, gradients(2)).parameters
        with refused("SCHEDULE_FAILED") as caught:
            take(worker, 3, gradients(3))
        assert "epoch = 3" in caught.value.message
    assert driver.get(session_id).status.steps == 2
    assert _rate(driver, session_id) == 0
    assert_same(driver.download(session_id), before)


def test_a_schedule_of_epochs_that_comes_to_its_end_refuses_the_epoch(driver: Driver) -> None:
    scheduler = LambdaLR(lr_lambda="1 / (1 - epoch) if epoch else 1")
    session_id = create(driver, spec(SGD(lr=1), scheduler=scheduler, unit=EPOCHS_UNIT))
    with driver.worker(session_id) as worker:
        take(worker, 1, gradients(1))
        with refused("SCHEDULE_FAILED"):
            driver.end_epoch(session_id, 1)
        assert take(worker, 2, gradients(2)).result.epochs == 0


def test_a_rate_that_would_overflow_refuses_the_step_and_changes_nothing(driver: Driver) -> None:
    scheduler = ExponentialLR(gamma=1e200)
    session_id = create(driver, spec(SGD(lr=1e-300), scheduler=scheduler))
    with driver.worker(session_id) as worker:
        for step in (1, 2, 3):  # With 1e-300, 1e-100 and 1e100; then 1e300, and no more.
            before = take(worker, step, {"w": torch.zeros(3, 5)}).parameters
        with refused("SCHEDULE_FAILED", field="scheduler") as caught:
            take(worker, 4, gradients(4))
    assert caught.value.actual == "inf"
    assert driver.get(session_id).status.steps == 3
    assert_same(driver.download(session_id), before)


def test_a_first_rate_that_overflows_is_refused(driver: Driver) -> None:
    scheduler = LambdaLR(lr_lambda="1e300")
    with refused("INVALID_HYPERPARAMETER", field="spec.scheduler"):
        create(driver, spec(SGD(lr=1e300), scheduler=scheduler))


def test_a_rate_to_which_the_present_is_in_no_proportion_is_refused(driver: Driver) -> None:
    scheduler = LambdaLR(lr_lambda="1e-320 if epoch else 1")
    session_id = create(driver, spec(SGD(lr=1), scheduler=scheduler))
    with driver.worker(session_id) as worker:
        take(worker, 1, gradients(1))
    before = driver.get(session_id)
    request = UpdateSessionRequest(session_id=session_id)
    request.optimizer.sgd.lr = 0.5
    with refused("INVALID_HYPERPARAMETER", field="optimizer.lr"):
        driver.update(request)
    assert driver.get(session_id) == before


def test_from_a_rate_of_zero_a_schedule_goes_on_as_if_it_had_begun_with_what_is_set(
    driver: Driver,
) -> None:
    scheduler = LambdaLR(lr_lambda="epoch / 4")
    session_id = create(driver, spec(SGD(lr=1), scheduler=scheduler))
    assert _rate(driver, session_id) == 0
    request = UpdateSessionRequest(session_id=session_id)
    request.optimizer.sgd.lr = 0.5
    driver.update(request)
    assert _rate(driver, session_id) == 0.5
    with driver.worker(session_id) as worker:
        for step in (1, 2, 3):
            take(worker, step, gradients(step))
            assert _rate(driver, session_id) == 0.5 * step / 4
