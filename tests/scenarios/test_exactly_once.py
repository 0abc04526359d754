"""A step that comes again: known by its digest, answered as the first time, and applied once."""

from __future__ import annotations

import math

import pytest
from drivers import Driver, StepAnswer, reopened, take, wait_for_contribution
from event_loop import TIMEOUT_S
from refusals import refused
from scenarios.models import assert_same, create, gradients, spec

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_pb2 import SGD, Adam

A, B = b"a" * 32, b"b" * 32  # As long as a digest may be.
WAITING = pb.Contribution(step=1, digest=A, applied=False)


def _is_the_same(again: StepAnswer, first: StepAnswer) -> None:
    """Make sure that an answer is the first one once more."""
    assert again.result.replayed
    assert again.result.gradient_norm == first.result.gradient_norm
    assert again.rates == first.rates
    assert_same(again.parameters, first.parameters)


@pytest.mark.parametrize("digest", [A, A[:16], b"\x00"], ids=["longest", "16-bytes", "a-zero"])
def test_a_step_with_the_digest_of_the_last_one_is_answered_again(
    driver: Driver, digest: bytes
) -> None:
    session_id = create(driver, spec(Adam(lr=0.1)))
    with driver.worker(session_id) as worker:
        first = take(worker, 1, gradients(1), digest)
        assert not first.result.replayed
        _is_the_same(take(worker, 1, gradients(1), digest), first)
    with driver.worker(session_id) as worker:
        _is_the_same(take(worker, 1, gradients(1), digest), first)
        assert take(worker, 2, gradients(2), B).result.step == 2
    assert driver.get(session_id).status.steps == 2


def test_another_digest_under_the_number_of_the_last_step_is_a_conflict(driver: Driver) -> None:
    session_id = create(driver, spec(Adam(lr=0.1)))
    with driver.worker(session_id) as worker:
        first = take(worker, 1, gradients(1), A)
        with refused("STEP_CONFLICT", field="digest") as caught:
            take(worker, 1, gradients(1), B)
        assert (caught.value.expected, caught.value.actual) == (A.hex(), B.hex())
        assert driver.contribution(session_id).contribution.digest == A
        assert_same(driver.download(session_id), first.parameters)
        _is_the_same(take(worker, 1, gradients(1), A), first)
        assert take(worker, 2, gradients(2), B).result.step == 2
        with refused("STEP_OUT_OF_ORDER", field="step") as caught:  # Whatever the digest says.
            take(worker, 1, gradients(1), A)
        assert caught.value.expected == "3"


@pytest.mark.parametrize(("first", "again"), [(b"", A), (A, b""), (b"", b"")])
def test_where_there_is_a_digest_on_one_side_only_numbers_are_compared(
    driver: Driver, first: bytes, again: bytes
) -> None:
    session_id = create(driver, spec(Adam(lr=0.1)))
    with driver.worker(session_id) as worker:
        answer = take(worker, 1, gradients(1), first)
        _is_the_same(take(worker, 1, gradients(1), again), answer)
    assert driver.contribution(session_id).contribution.digest == first


def test_two_workers_digests_have_nothing_to_do_with_each_other(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(lr=1), workers=2))
    with driver.worker(session_id, 0) as one, driver.worker(session_id, 1) as other:
        waiting = one.start(1, gradients(1), A)
        came = take(other, 1, gradients(2), B)
        waiting.result(TIMEOUT_S)
        _is_the_same(take(one, 1, gradients(1), A), came)
        _is_the_same(take(other, 1, gradients(2), B), came)
        for worker, digest in ((one, B), (other, A)):
            with refused("STEP_CONFLICT"):
                take(worker, 1, gradients(1), digest)


def test_a_contribution_to_the_open_round_can_be_repeated_but_not_replaced(driver: Driver) -> None:
    shared, alone = create(driver, spec(Adam(), workers=2)), create(driver, spec(Adam()))
    with driver.worker(shared, 1) as second, driver.worker(alone) as single:
        with driver.worker(shared, 0) as first:
            first.start(1, gradients(1), A)
            wait_for_contribution(driver, shared, WAITING)
            first.abandon()
        with reopened(driver, shared, 0) as first:
            assert first.contribution == WAITING
            with refused("STEP_CONFLICT", field="digest"):
                take(first, 1, gradients(1), B)
            waiting = first.start(1, gradients(1), A)
            mean = {n: (g + gradients(2)[n]) / 2 for n, g in gradients(1).items()}
            came, wanted = take(second, 1, gradients(2)), take(single, 1, mean)
            assert_same(came.parameters, wanted.parameters)
            assert_same(waiting.result(TIMEOUT_S).parameters, wanted.parameters)
    assert driver.get(shared).status.steps == 1


def test_a_step_that_was_refused_leaves_no_digest_behind(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(lr=1)))
    poison = gradients(1)
    poison["b"][0] = math.nan
    with driver.worker(session_id) as worker:
        with refused("NON_FINITE_GRADIENT"):
            take(worker, 1, poison, A)
        assert not driver.contribution(session_id).HasField("contribution")
        take(worker, 1, gradients(1), B)
        with refused("NO_GRADIENT"):
            take(worker, 2, {}, A)
        assert driver.contribution(session_id).contribution == pb.Contribution(
            step=1, digest=B, applied=True
        )
        assert take(worker, 2, gradients(2), B).result.step == 2


def test_a_round_that_was_refused_leaves_no_digest_behind(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(lr=1), workers=2))
    with driver.worker(session_id, 0) as one, driver.worker(session_id, 1) as other:
        waiting = one.start(1, {}, A)
        with refused("NO_GRADIENT"):
            take(other, 1, {}, A)
        with refused("NO_GRADIENT"):
            waiting.result(TIMEOUT_S)
        again = one.start(1, gradients(1), B)
        assert take(other, 1, gradients(2), B).result.step == 1
        again.result(TIMEOUT_S)
    assert driver.contribution(session_id, 1).contribution.digest == B


def test_what_became_of_a_step_is_one_question(driver: Driver) -> None:
    session_id = create(driver, spec(Adam(lr=0.1), workers=2))
    assert not driver.contribution(session_id).HasField("contribution")
    with driver.worker(session_id, 0) as one, driver.worker(session_id, 1) as other:
        assert one.contribution is None
        one.start(1, gradients(1), A)
        wait_for_contribution(driver, session_id, WAITING)
        waits = driver.contribution(session_id)
        assert not waits.HasField("result")
        assert waits.status.steps == 0
        assert not driver.contribution(session_id, 1).HasField("contribution")

        came = take(other, 1, gradients(2), B)
        for worker, digest in enumerate((A, B)):
            answer = driver.contribution(session_id, worker)
            assert answer.contribution == pb.Contribution(step=1, digest=digest, applied=True)
            assert answer.result.gradient_norm == came.result.gradient_norm
            assert answer.result.replayed
            assert answer.status == driver.get(session_id).status
    with driver.worker(session_id, 1) as other:
        assert other.contribution == pb.Contribution(step=1, digest=B, applied=True)


def test_what_became_of_a_step_is_asked_of_a_worker_of_a_session(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(), workers=2))
    with refused("INVALID_FIELD", field="worker"):
        driver.contribution(session_id, 2)
    driver.delete(session_id)
    with refused("SESSION_NOT_FOUND", field="session_id"):
        driver.contribution(session_id)
