"""Several workers of one session: rounds, and what one worker's trouble does to the others."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack

import pytest
import torch
from drivers import Driver, StepAnswer, Tensors, Worker, reopened, take
from drivers_shared import SharedDriver
from event_loop import TIMEOUT_S
from refusals import RefusedError, refused
from scenarios.models import assert_same, create, gradients, model, spec

from optserve.v1.optimizer_pb2 import SGD, Adam

APART_S = 0.01  # Far enough for contributions to arrive in the order in which they are sent.


def _mean(contributions: Sequence[Tensors]) -> dict[str, torch.Tensor]:
    """Add in the order of the workers, then divide."""
    total = dict(contributions[0])
    for contribution in contributions[1:]:
        total = {name: total[name] + gradient for name, gradient in contribution.items()}
    return {name: gradient / len(contributions) for name, gradient in total.items()}


def _round(
    workers: Sequence[Worker], order: Sequence[int], step: int, contributions: Sequence[Tensors]
) -> list[StepAnswer]:
    """Let the workers contribute in an order; return the answers, by worker."""
    answers: dict[int, Future[StepAnswer]] = {}
    for worker in order:
        answers[worker] = workers[worker].start(step, contributions[worker])
        time.sleep(APART_S)
    return [answers[worker].result(TIMEOUT_S) for worker in sorted(order)]


@pytest.mark.parametrize("count", [2, 4])
def test_workers_equal_one_worker_with_the_mean_in_whatever_order_they_come(
    driver: Driver, count: int
) -> None:
    shared, alone = create(driver, spec(Adam(), workers=count)), create(driver, spec(Adam()))
    with ExitStack() as stack:
        workers = [stack.enter_context(driver.worker(shared, i)) for i in range(count)]
        single = stack.enter_context(driver.worker(alone))
        for step, order in enumerate(itertools.permutations(range(count)), start=1):
            contributions = [gradients(100 * step + worker) for worker in range(count)]
            answers = _round(workers, order, step, contributions)
            wanted = take(single, step, _mean(contributions))
            for answer in answers:
                assert_same(answer.parameters, wanted.parameters)
                assert answer.result.gradient_norm == wanted.result.gradient_norm
                assert answer.result.step == step
                assert not answer.result.replayed


def test_a_gradient_that_some_bring_counts_as_zeros_of_the_others(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(lr=1), workers=2))
    with driver.worker(session_id, 0) as first, driver.worker(session_id, 1) as second:
        contributions = [{"w": gradients(1)["w"]}, {}]
        came = _round([first, second], [0, 1], 1, contributions)[1]
        assert_same(came.parameters, {"w": model()["w"] - gradients(1)["w"] / 2, "b": model()["b"]})


def test_a_round_without_any_gradient_is_refused_to_all_and_can_be_tried_again(
    driver: Driver,
) -> None:
    session_id = create(driver, spec(SGD(lr=1), workers=2))
    with driver.worker(session_id, 0) as first, driver.worker(session_id, 1) as second:
        waiting = first.start(1, {})
        with refused("NO_GRADIENT", field="gradients"):
            take(second, 1, {})
        with refused("NO_GRADIENT"):
            waiting.result(TIMEOUT_S)
        answers = _round([first, second], [1, 0], 1, [gradients(1), gradients(2)])
        assert [answer.result.step for answer in answers] == [1, 1]


def test_a_gradient_that_is_not_finite_is_the_mistake_of_one_worker_only(driver: Driver) -> None:
    shared, alone = create(driver, spec(Adam(), workers=2)), create(driver, spec(Adam()))
    poison = gradients(1)
    poison["w"][0, 0] = math.nan
    with (
        driver.worker(shared, 0) as first,
        driver.worker(shared, 1) as second,
        driver.worker(alone) as single,
    ):
        waiting = first.start(1, gradients(1))
        with refused("NON_FINITE_GRADIENT", field="gradients['w']"):
            take(second, 1, poison)
        assert not waiting.done()
        came = take(second, 1, gradients(2))
        wanted = take(single, 1, _mean([gradients(1), gradients(2)]))
        assert_same(came.parameters, wanted.parameters)
        assert_same(waiting.result(TIMEOUT_S).parameters, wanted.parameters)


def test_a_worker_that_breaks_off_while_it_waits_has_contributed(driver: Driver) -> None:
    shared, alone = create(driver, spec(Adam(), workers=2)), create(driver, spec(Adam()))
    with driver.worker(shared, 1) as second, driver.worker(alone) as single:
        with driver.worker(shared, 0) as first:
            first.start(1, gradients(1))
            time.sleep(0.1)
            first.abandon()
        with reopened(driver, shared, 0) as first:
            assert first.status.steps == 0
            # The first contribution is the one that counts; in shared memory, what lies there.
            again = 1 if isinstance(driver, SharedDriver) else 7
            waiting = first.start(1, gradients(again))
            time.sleep(0.1)
            came = take(second, 1, gradients(2))
            wanted = take(single, 1, _mean([gradients(1), gradients(2)]))
            assert_same(came.parameters, wanted.parameters)
            assert_same(waiting.result(TIMEOUT_S).parameters, wanted.parameters)
            answers = _round([first, second], [0, 1], 2, [gradients(3), gradients(4)])
        wanted = take(single, 2, _mean([gradients(3), gradients(4)]))
        for answer in answers:
            assert_same(answer.parameters, wanted.parameters)


def test_a_worker_that_comes_back_after_the_round_gets_its_result(driver: Driver) -> None:
    session_id = create(driver, spec(Adam(), workers=2))
    with driver.worker(session_id, 1) as second:
        with driver.worker(session_id, 0) as first:
            first.start(1, gradients(1))
            time.sleep(0.1)
            first.abandon()
        came = take(second, 1, gradients(2))
        with reopened(driver, session_id, 0) as first:
            assert first.status.steps == 1
            again = take(first, 1, gradients(1))
            assert again.result.replayed
            assert_same(again.parameters, came.parameters)


@pytest.mark.parametrize("pause_s", [0, 0.01, 0.03, 0.1])
def test_a_step_is_applied_once_even_if_it_is_sent_again_while_it_is_applied(
    driver: Driver, pause_s: float
) -> None:
    values = {"large": torch.zeros(3_000_000)}  # Tens of milliseconds, if nothing is fused.
    gradient = {"large": torch.ones(3_000_000)}
    session_id = driver.create(spec(SGD(lr=1, fused=False), parameters=values)).status.session_id
    driver.upload(session_id, values)
    with driver.worker(session_id) as worker:
        worker.start(1, gradient)
        time.sleep(pause_s)
        worker.abandon()
    with reopened(driver, session_id, 0) as worker:
        came = take(worker, 1, gradient)
        assert came.result.step == 1
        assert_same(came.parameters, {"large": -gradient["large"]})
        assert take(worker, 2, gradient).result.step == 2
    assert driver.get(session_id).status.steps == 2
    driver.delete(session_id)


def test_a_round_that_is_not_complete_in_time_keeps_what_it_has(driver: Driver) -> None:
    wanted = spec(SGD(lr=1), workers=3)
    wanted.limits.round_timeout_s = 0.2
    session_id = create(driver, wanted)
    with ExitStack() as stack:
        workers = [stack.enter_context(driver.worker(session_id, i)) for i in range(3)]
        contributions = [gradients(worker) for worker in range(3)]
        for _ in range(2):  # Once more, to go on waiting.
            with refused("ROUND_TIMEOUT", field="step") as caught:
                take(workers[1], 1, contributions[1])
            assert "[0, 2]" in caught.value.message
            assert caught.value.retry_after_s == 0
        assert driver.get(session_id).status.steps == 0
        answers = [workers[i].start(1, contributions[i]) for i in (2, 0)]
        expected = {n: model()[n] - gradient for n, gradient in _mean(contributions).items()}
        for answer in answers:
            assert_same(answer.result(TIMEOUT_S).parameters, expected)
        assert take(workers[1], 1, {}).result.replayed


def test_a_worker_has_one_stream_at_a_time(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(lr=1), workers=2))
    with driver.worker(session_id, 1) as worker:
        with refused("WORKER_BUSY", field="worker"), driver.worker(session_id, 1):
            pass
        with driver.worker(session_id, 0) as other:
            answers = _round([other, worker], [0, 1], 1, [gradients(1), gradients(2)])
            assert [answer.result.step for answer in answers] == [1, 1]
    with reopened(driver, session_id, 1) as worker:
        assert worker.status.steps == 1


@pytest.mark.parametrize("worker", [2, 2**32 - 1])
def test_there_are_no_more_workers_than_the_session_says(driver: Driver, worker: int) -> None:
    session_id = create(driver, spec(SGD(), workers=2))
    with refused("INVALID_FIELD", field="worker"), driver.worker(session_id, worker):
        pass


def test_a_deleted_session_ends_the_streams_of_those_who_wait_and_of_those_who_rest(
    driver: Driver,
) -> None:
    session_id = create(driver, spec(SGD(), workers=2))
    with driver.worker(session_id, 0) as waiting, driver.worker(session_id, 1) as resting:
        answer = waiting.start(1, gradients(1))
        time.sleep(0.1)
        driver.delete(session_id)
        with refused("SESSION_DELETED"):
            answer.result(TIMEOUT_S)
        with pytest.raises(RefusedError) as caught:
            take(resting, 1, gradients(1))
        assert caught.value.reason == "SESSION_DELETED"
    with refused("SESSION_NOT_FOUND", field="session_id"):
        driver.get(session_id)


def test_a_mean_of_fp16_that_fits_is_right_where_its_sum_would_overflow(driver: Driver) -> None:
    large = 0.9 * torch.finfo(torch.float16).max
    values = {"w": torch.zeros(4, dtype=torch.float16)}
    wanted = spec(SGD(lr=1), parameters=values, workers=3)
    session_id = driver.create(wanted, values).status.session_id
    gradient = {"w": torch.tensor([large, -large, 1.0, 2.0], dtype=torch.float16)}
    with ExitStack() as stack:
        workers = [stack.enter_context(driver.worker(session_id, i)) for i in range(3)]
        for answer in [worker.start(1, gradient) for worker in workers]:
            assert torch.equal(answer.result(TIMEOUT_S).parameters["w"], -gradient["w"])
