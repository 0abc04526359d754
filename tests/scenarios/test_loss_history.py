"""Evaluations: what they find, that they change nothing, and the curves that they leave."""

from __future__ import annotations

import math

import pytest
import torch
from drivers import Driver, take
from paging import point_pages
from refusals import refused
from scenarios.models import assert_same, create, gradients, spec
from torch import Tensor

from optserve.v1.loss_pb2 import BCELoss, CrossEntropyLoss, MSELoss, Reduction
from optserve.v1.optimizer_pb2 import SGD, Adam
from optserve.v1.optimizer_service_pb2 import ListLossPointsRequest
from optserve.v1.session_pb2 import LossPoint, Split

TRAIN, VALIDATION = Split.SPLIT_TRAIN, Split.SPLIT_VALIDATION


def _points(
    driver: Driver,
    session_id: str,
    split: Split.ValueType = Split.SPLIT_UNSPECIFIED,
    page_size: int = 0,
) -> tuple[list[LossPoint], int]:
    """Read all pages; return the points, and how many older ones are forgotten."""
    request = ListLossPointsRequest(session_id=session_id, split=split, page_size=page_size)
    points: list[LossPoint] = []
    for page in point_pages(driver, request):
        assert len(page.points) <= (page_size or len(page.points))
        points += page.points
    return points, page.forgotten


def _of(value: float) -> tuple[Tensor, Tensor]:
    """Return predictions and targets whose squared difference is ``value``."""
    return torch.tensor([math.sqrt(value)], dtype=torch.float64), torch.zeros(1).double()


def test_an_evaluation_changes_nothing_but_the_history(driver: Driver) -> None:
    session_id, other = (create(driver, spec(Adam(lr=0.1), loss=MSELoss())) for _ in range(2))
    with driver.worker(session_id) as worker, driver.worker(other) as plain:
        take(worker, 1, gradients(1))
        before = driver.get(session_id)
        for split in (TRAIN, VALIDATION, Split.SPLIT_UNSPECIFIED):
            for gradient in (True, False):
                driver.evaluate(session_id, *_of(4), split=split, gradient=gradient)
        after = driver.get(session_id)
        assert after.status.reserved_bytes > before.status.reserved_bytes  # For the points.
        before.status.reserved_bytes = after.status.reserved_bytes
        assert after == before
        take(plain, 1, gradients(1))
        came, wanted = (take(each, 2, gradients(2)) for each in (worker, plain))
    assert_same(came.parameters, wanted.parameters)


def test_points_tell_when_they_were_evaluated_and_on_what(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(), loss=MSELoss()))
    with driver.worker(session_id) as worker:
        driver.evaluate(session_id, *_of(4), split=TRAIN)
        take(worker, 1, gradients(1))
        driver.evaluate(session_id, *_of(9), split=VALIDATION)
        driver.evaluate(session_id, *_of(1))  # Of no split: not kept.
        driver.end_epoch(session_id, 1)
        take(worker, 2, gradients(2))
        driver.evaluate(session_id, *_of(16), split=TRAIN)
    points, forgotten = _points(driver, session_id)
    assert [(p.sequence, p.split, p.steps, p.epochs, p.loss) for p in points] == [
        (1, TRAIN, 0, 0, 4),
        (2, VALIDATION, 1, 0, 9),
        (3, TRAIN, 2, 1, 16),
    ]
    assert not any(point.HasField("accuracy") for point in points)
    times = [point.time.ToNanoseconds() for point in points]
    assert times == sorted(times)
    assert times[0] > 0
    assert forgotten == 0


def test_the_history_is_bounded_for_each_split_and_tells_what_it_forgot(driver: Driver) -> None:
    wanted = spec(SGD(), loss=MSELoss())
    wanted.limits.loss_points_max = 3
    session_id = create(driver, wanted)
    for value in range(1, 8):
        driver.evaluate(session_id, *_of(value**2), split=TRAIN)
    driver.evaluate(session_id, *_of(64), split=VALIDATION)
    points, forgotten = _points(driver, session_id)
    assert [(point.sequence, point.loss) for point in points] == [
        (5, 25),
        (6, 36),
        (7, 49),
        (8, 64),
    ]
    assert forgotten == 4
    points, forgotten = _points(driver, session_id, VALIDATION)
    assert ([point.sequence for point in points], forgotten) == ([8], 0)


def test_a_session_may_keep_no_history(driver: Driver) -> None:
    wanted = spec(SGD(), loss=MSELoss())
    wanted.limits.loss_points_max = 0
    session_id = create(driver, wanted)
    assert driver.evaluate(session_id, *_of(4), split=TRAIN).result.loss == 4
    assert _points(driver, session_id) == ([], 1)


@pytest.mark.parametrize("page_size", [1, 2, 3, 100])
def test_pages_hold_every_point_once(driver: Driver, page_size: int) -> None:
    session_id = create(driver, spec(SGD(), loss=MSELoss()))
    for value in range(6):
        split = TRAIN if value % 3 else VALIDATION
        driver.evaluate(session_id, *_of(value**2), split=split)
    points, _ = _points(driver, session_id, page_size=page_size)
    assert [point.sequence for point in points] == [1, 2, 3, 4, 5, 6]
    points, _ = _points(driver, session_id, TRAIN, page_size)
    assert [point.sequence for point in points] == [2, 3, 5, 6]


def test_a_loss_that_is_not_finite_is_told_and_kept(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(), loss=MSELoss()))
    infinite = torch.tensor([math.inf]), torch.zeros(1)
    assert driver.evaluate(session_id, *infinite, split=TRAIN).result.loss == math.inf
    empty = torch.zeros(0), torch.zeros(0)
    assert math.isnan(driver.evaluate(session_id, *empty, split=TRAIN).result.loss)
    points, _ = _points(driver, session_id)
    assert points[0].loss == math.inf
    assert math.isnan(points[1].loss)


def test_accuracy_is_the_share_of_right_classes(driver: Driver) -> None:
    loss = CrossEntropyLoss(ignore_index=3)
    session_id = create(driver, spec(SGD(), loss=loss))
    logits = torch.eye(4)[[0, 1, 2, 2, 0]]
    targets = torch.tensor([0, 1, 0, 2, 3])  # Right, right, wrong, right, ignored.
    result = driver.evaluate(session_id, logits, targets, split=VALIDATION).result
    assert result.accuracy == 0.75
    assert _points(driver, session_id)[0][0].accuracy == 0.75
    ignored = driver.evaluate(session_id, logits, torch.full((5,), 3)).result
    assert not ignored.HasField("accuracy")
    session_id = create(driver, spec(SGD(), loss=CrossEntropyLoss()))
    shares = torch.eye(4)[[0, 1, 0, 2, 3]]  # A class of which no share is larger.
    assert driver.evaluate(session_id, logits, shares).result.accuracy == 0.6


def test_accuracy_of_two_classes_is_the_share_on_the_right_side_of_a_half(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(), loss=BCELoss()))
    predictions = torch.tensor([0.9, 0.5, 0.4, 0.1])
    labels = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert driver.evaluate(session_id, predictions, labels).result.accuracy == 0.75
    soft = torch.tensor([1.0, 0.5, 1.0, 0.0])
    assert not driver.evaluate(session_id, predictions, soft).result.HasField("accuracy")


def test_elements_come_if_nothing_reduces_them(driver: Driver) -> None:
    session_id = create(driver, spec(SGD(), loss=MSELoss(reduction=Reduction.REDUCTION_NONE)))
    predictions, targets = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)
    came = driver.evaluate(session_id, predictions, targets, gradient=True)
    assert came.result.loss == 5
    assert came.elements is not None
    assert came.elements.tolist() == [[1, 4]]
    assert came.gradient is not None
    assert came.gradient.tolist() == [[2, 4]]


def test_a_session_without_a_loss_evaluates_none(driver: Driver) -> None:
    session_id = create(driver, spec(SGD()))
    with refused("LOSS_NOT_SET", field="loss"):
        driver.evaluate(session_id, *_of(4), split=TRAIN)
    assert _points(driver, session_id) == ([], 0)


def test_an_evaluation_needs_no_parameters(driver: Driver) -> None:
    session_id = driver.create(spec(SGD(), loss=MSELoss())).status.session_id
    assert driver.evaluate(session_id, *_of(4), split=TRAIN).result.loss == 4
