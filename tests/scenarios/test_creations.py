"""A request to create a session that comes again makes no second one."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from drivers import Driver, take
from event_loop import TIMEOUT_S
from paging import pages
from refusals import RefusedError, refused
from scenarios.models import assert_same, gradients, model, spec

from optserve.v1.optimizer_pb2 import SGD, Adam
from optserve.v1.session_pb2 import SessionSpec, SessionState

LARGE = {"large": torch.zeros(16_000_000)}  # 64 MB: takes a while.


@pytest.fixture
def request_id() -> str:
    """Return an id that nobody has used: drivers share servers."""
    return secrets.token_hex(32)


def _ids(driver: Driver) -> list[str]:
    found = pages(lambda token: driver.sessions(page_token=token))
    return [status.session_id for page in found for status in page.sessions]


def test_a_repeat_is_answered_with_the_session_that_was_made_first(
    driver: Driver, request_id: str
) -> None:
    first = driver.create(spec(Adam()), model(), request_id)
    count = len(_ids(driver))
    assert driver.create(spec(Adam()), model(), request_id) == first
    with driver.worker(first.status.session_id) as worker:
        came = take(worker, 1, gradients(1))
    again = driver.create(spec(Adam()), model(), request_id)
    assert again.status.session_id == first.status.session_id
    assert again.status.steps == 1  # It is where it is.
    assert_same(driver.download(first.status.session_id), came.parameters)
    assert len(_ids(driver)) == count


def test_without_an_id_or_with_another_one_each_request_makes_a_session(driver: Driver) -> None:
    ids = {
        driver.create(spec(SGD()), request_id=request_id).status.session_id
        for request_id in ("", "", secrets.token_hex(8), secrets.token_hex(8))
    }
    assert len(ids) == 4


def _with_other_values(values: dict[str, torch.Tensor]) -> None:
    values["w"][2, 4] += 1


OTHERS: dict[str, Callable[[SessionSpec, dict[str, torch.Tensor]], object]] = {
    "rate": lambda wanted, _: setattr(wanted.optimizer.sgd, "lr", 0.5),
    "name": lambda wanted, _: setattr(wanted, "display_name", "other"),
    "workers": lambda wanted, _: setattr(wanted, "workers", 2),
    "value": lambda _, values: _with_other_values(values),
    "fewer-values": lambda _, values: values.pop("b"),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_another_request_under_the_same_id_is_a_conflict(
    driver: Driver,
    request_id: str,
    change: Callable[[SessionSpec, dict[str, torch.Tensor]], object],
) -> None:
    first = driver.create(spec(SGD(lr=1)), model(), request_id)
    before = _ids(driver)
    wanted, values = spec(SGD(lr=1)), model()
    change(wanted, values)
    with refused("REQUEST_CONFLICT", field="request_id"):
        driver.create(wanted, values, request_id)
    assert _ids(driver) == before
    assert driver.create(spec(SGD(lr=1)), model(), request_id) == first
    driver.delete(first.status.session_id)


def test_a_request_is_known_for_as_long_as_its_session_is_there(
    driver: Driver, request_id: str
) -> None:
    first = driver.create(spec(SGD(lr=1)), model(), request_id)
    driver.delete(first.status.session_id)
    second = driver.create(spec(Adam()), request_id=request_id)  # Nor need it be the same.
    assert second.status.session_id != first.status.session_id
    assert second.status.state == SessionState.SESSION_STATE_AWAITING_PARAMETERS


def test_a_request_that_was_refused_can_be_tried_again(driver: Driver, request_id: str) -> None:
    wanted = spec(SGD(lr=1))
    wanted.optimizer.sgd.nesterov = True  # Without a momentum.
    with refused("INVALID_HYPERPARAMETER"):
        driver.create(wanted, model(), request_id)
    wanted.optimizer.sgd.nesterov = False
    assert driver.create(wanted, model(), request_id).status.session_id in _ids(driver)


def test_repeats_that_come_while_the_session_is_being_made_wait_for_it(
    driver: Driver, request_id: str
) -> None:
    wanted = spec(SGD(lr=1), parameters=LARGE)
    before = _ids(driver)

    def created(number: int) -> str:
        wanted_now = wanted if number % 4 else spec(SGD(lr=2), parameters=LARGE)
        try:
            return driver.create(wanted_now, request_id=request_id).status.session_id
        except RefusedError as error:
            return error.reason

    with ThreadPoolExecutor(8) as threads:
        came = set(threads.map(created, range(8), timeout=TIMEOUT_S))
    made = came - {"REQUEST_CONFLICT"}
    assert len(made) == 1
    assert len(came) == 2  # Those that asked for something else were told, whoever was first.
    assert set(_ids(driver)) - set(before) == made
    driver.delete(made.pop())


def test_an_id_in_any_script_is_an_id(driver: Driver) -> None:
    request_id = "Anfrage-ä-順序-🙂-" + secrets.token_hex(4)
    first = driver.create(spec(SGD()), request_id=request_id)
    assert driver.create(spec(SGD()), request_id=request_id) == first
