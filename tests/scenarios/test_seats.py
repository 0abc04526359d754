"""Seats: who comes back takes its own, another's is left alone, and no step is doubled."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pytest
import torch
from drivers import Driver, reopened, take, wait_for_contribution
from event_loop import TIMEOUT_S
from refusals import refused
from scenarios.models import assert_same, create, gradients, spec

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_pb2 import SGD, Adam

ME, OTHER = b"m" * 16, b"o" * 16
DIGEST = b"d" * 32


def test_a_client_takes_its_own_seat_and_the_stream_that_had_it_ends(driver: Driver) -> None:
    session_id = create(driver, spec(Adam()))
    with driver.worker(session_id, client_id=ME) as old:
        first = take(old, 1, gradients(1), DIGEST)
        with driver.worker(session_id, client_id=ME) as new:
            assert new.status.steps == 1
            assert new.contribution == pb.Contribution(step=1, digest=DIGEST, applied=True)
            with refused("SEAT_TAKEN_OVER", field="worker"):
                take(old, 2, gradients(2))
            again = take(new, 1, gradients(1), DIGEST)
            assert again.result.replayed
            assert_same(again.parameters, first.parameters)
            assert take(new, 2, gradients(2)).result.step == 2
    assert driver.get(session_id).status.steps == 2


@pytest.mark.parametrize(("holder", "comer"), [(ME, OTHER), (ME, b""), (b"", ME), (b"", b"")])
def test_the_seat_of_another_client_is_left_alone(
    driver: Driver, holder: bytes, comer: bytes
) -> None:
    session_id = create(driver, spec(SGD(lr=1)))
    with driver.worker(session_id, client_id=holder) as worker:
        with (
            refused("WORKER_BUSY", field="worker"),
            driver.worker(session_id, client_id=comer),
        ):
            pass
        assert take(worker, 1, gradients(1)).result.step == 1
    with reopened(driver, session_id, client_id=comer) as worker:
        assert worker.status.steps == 1


def test_a_client_s_seats_of_other_workers_stay_its_own(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(lr=1), workers=2))
    with (
        driver.worker(session_id, 0, client_id=ME) as one,
        driver.worker(session_id, 1, client_id=ME) as two,
    ):
        waiting = one.start(1, gradients(1))
        assert take(two, 1, gradients(2)).result.step == 1
        assert waiting.result(TIMEOUT_S).result.step == 1


def test_of_many_streams_of_one_client_the_last_one_has_the_seat(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(lr=1)))
    with ExitStack() as stack:
        streams = [stack.enter_context(driver.worker(session_id, client_id=ME)) for _ in range(5)]
        for stream in streams[:-1]:
            with refused("SEAT_TAKEN_OVER"):
                take(stream, 1, gradients(1))
        assert take(streams[-1], 1, gradients(1)).result.step == 1


def test_what_a_stream_has_contributed_stays_when_its_seat_is_taken(driver: Driver) -> None:
    shared, alone = create(driver, spec(Adam(), workers=2)), create(driver, spec(Adam()))
    waits = pb.Contribution(step=1, digest=DIGEST, applied=False)
    with (
        driver.worker(shared, 1) as second,
        driver.worker(alone) as single,
        driver.worker(shared, 0, client_id=ME) as old,
    ):
        lost = old.start(1, gradients(1), DIGEST)
        wait_for_contribution(driver, shared, waits)
        with driver.worker(shared, 0, client_id=ME) as new:
            with refused("SEAT_TAKEN_OVER"):
                lost.result(TIMEOUT_S)
            assert new.contribution == waits
            waiting = new.start(1, gradients(1), DIGEST)
            take(second, 1, gradients(2))
            mean = {n: (g + gradients(2)[n]) / 2 for n, g in gradients(1).items()}
            wanted = take(single, 1, mean).parameters
            assert_same(waiting.result(TIMEOUT_S).parameters, wanted)
    assert driver.get(shared).status.steps == 1


@pytest.mark.parametrize("pause_s", [0, 0.003, 0.01, 0.03, 0.1])
def test_a_step_that_is_sent_again_from_a_taken_seat_is_applied_once(
    driver: Driver, pause_s: float
) -> None:
    """Whether the first was on its way, being applied, or being answered."""
    values = {"large": torch.zeros(3_000_000)}  # Tens of milliseconds, if nothing is fused.
    gradient = {"large": torch.ones(3_000_000)}
    session_id = driver.create(spec(SGD(lr=1, fused=False), parameters=values)).status.session_id
    driver.upload(session_id, values)
    with driver.worker(session_id, client_id=ME) as old:
        old.start(1, gradient, DIGEST)
        time.sleep(pause_s)
        with driver.worker(session_id, client_id=ME) as new:
            taken = new.contribution is not None
            came = take(new, 1, gradient, DIGEST)
            assert_same(came.parameters, {"large": -gradient["large"]})
            assert taken or not came.result.replayed
            with refused("STEP_CONFLICT"):
                take(new, 1, gradient, b"another")
            assert take(new, 2, gradient, b"next").result.step == 2
    assert driver.get(session_id).status.steps == 2
    driver.delete(session_id)


def test_a_deleted_session_ends_the_stream_that_has_taken_the_seat_over(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(), workers=2))
    with driver.worker(session_id, client_id=ME) as old:
        lost = old.start(1, gradients(1))
        with driver.worker(session_id, client_id=ME) as new:
            driver.delete(session_id)
            with refused("SESSION_DELETED"):
                take(new, 1, gradients(1))
        with refused("SEAT_TAKEN_OVER"):
            lost.result(TIMEOUT_S)
