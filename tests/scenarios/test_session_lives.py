"""Sessions beside each other: created, listed, deleted, and never in each other's way."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from drivers import Driver, take
from paging import pages
from refusals import refused
from scenarios.models import assert_same, create, gradients, model, spec

from optserve.v1.optimizer_pb2 import SGD, Adam
from optserve.v1.optimizer_service_pb2 import ListLossPointsRequest, UpdateSessionRequest
from optserve.v1.session_pb2 import SessionState


def _all_ids(driver: Driver, page_size: int) -> list[str]:
    ids: list[str] = []
    for page in pages(lambda token: driver.sessions(page_size, token)):
        assert len(page.sessions) <= page_size
        ids += [status.session_id for status in page.sessions]
    return ids


def test_sessions_with_the_same_names_do_not_touch_each_other(driver: Driver) -> None:
    first, second = create(driver, spec(Adam(lr=0.1))), create(driver, spec(SGD(lr=1)))
    with driver.worker(first) as one, driver.worker(second) as two:
        before = take(one, 1, gradients(1)).parameters
        for step in range(1, 4):
            take(two, step, gradients(step))
        driver.end_epoch(second, 1)
        driver.delete(second)
        assert_same(driver.download(first), before)
        status = driver.get(first).status
        assert (status.steps, status.epochs) == (1, 0)
        assert take(one, 2, gradients(2)).result.step == 2


@pytest.mark.parametrize("page_size", [1, 2, 3, 100])
def test_pages_list_every_session_once_the_oldest_first(driver: Driver, page_size: int) -> None:
    created = [create(driver, spec(SGD())) for _ in range(3)]
    listed = _all_ids(driver, page_size)
    assert [session_id for session_id in listed if session_id in created] == created
    assert len(set(listed)) == len(listed)
    driver.delete(created[1])
    listed = _all_ids(driver, page_size)
    assert [session_id for session_id in listed if session_id in created] == created[::2]


def test_a_page_goes_on_where_the_last_one_ended_whatever_was_deleted(driver: Driver) -> None:
    for session_id in _all_ids(driver, 100):
        driver.delete(session_id)
    created = [create(driver, spec(SGD())) for _ in range(4)]
    page = driver.sessions(2)
    driver.delete(created[1])
    rest = driver.sessions(2, page.next_page_token)
    assert [status.session_id for status in rest.sessions] == created[2:]
    assert rest.next_page_token == ""


def test_a_deleted_session_is_answered_once_more_and_then_unknown(driver: Driver) -> None:
    session_id = create(driver, spec(SGD()))
    with driver.worker(session_id) as worker:
        take(worker, 1, gradients(1))
    assert driver.delete(session_id).steps == 1
    attempts: dict[str, Callable[[], object]] = {
        "get": lambda: driver.get(session_id),
        "delete": lambda: driver.delete(session_id),
        "upload": lambda: driver.upload(session_id, model()),
        "download": lambda: driver.download(session_id),
        "update": lambda: driver.update(UpdateSessionRequest(session_id=session_id)),
        "end_epoch": lambda: driver.end_epoch(session_id, 1),
        "evaluate": lambda: driver.evaluate(session_id, model()["b"], model()["b"]),
        "points": lambda: driver.loss_points(ListLossPointsRequest(session_id=session_id)),
        "worker": lambda: driver.worker(session_id).__enter__(),
    }
    for attempt in attempts.values():
        with refused("SESSION_NOT_FOUND", field="session_id"):
            attempt()


@pytest.mark.parametrize("session_id", ["", "0" * 32, "no such session", "\N{SNOWMAN}" * 5_000])
def test_an_id_that_was_never_given_is_unknown(driver: Driver, session_id: str) -> None:
    with refused("SESSION_NOT_FOUND", field="session_id"):
        driver.get(session_id)


def test_many_sessions_step_at_the_same_time(driver: Driver) -> None:
    def trained(seed: int) -> dict[str, list[float]]:
        session_id = create(driver, spec(Adam(lr=0.1)))
        with driver.worker(session_id) as worker:
            for step in range(1, 6):
                answer = take(worker, step, gradients(seed + step))
        driver.delete(session_id)
        return {name: value.tolist() for name, value in answer.parameters.items()}

    seeds = [10 * (seed % 4) for seed in range(16)]
    with ThreadPoolExecutor(len(seeds)) as pool:
        ends = list(pool.map(trained, seeds))
    assert ends[4:] == ends[:-4]  # The same gradients lead to the same end, whoever else is there.
    assert ends[0] != ends[1]


def test_a_session_has_the_name_that_it_is_given(driver: Driver) -> None:
    wanted = spec(SGD())
    wanted.display_name = "Größe 数字"
    session = driver.create(wanted)
    assert session.status.display_name == session.spec.display_name == wanted.display_name
    assert session.status.state == SessionState.SESSION_STATE_AWAITING_PARAMETERS


def test_values_may_come_with_a_new_session_or_later_or_both(driver: Driver) -> None:
    wanted = spec(SGD())
    session = driver.create(wanted, {"w": model()["w"]})
    assert session.status.state == SessionState.SESSION_STATE_AWAITING_PARAMETERS
    driver.upload(session.status.session_id, {"b": model()["b"]})
    assert_same(driver.download(session.status.session_id), model())
