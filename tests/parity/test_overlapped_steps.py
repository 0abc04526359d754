"""A session is torch.optim, too, where steps are answered while their gradients arrive."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Literal

import pytest
import torch
from drivers import StepAnswer, Tensors
from drivers_forms import FormDriver, FormWorker
from drivers_grpc import opening
from event_loop import TIMEOUT_S
from messages import bytes_of, chunks_of
from parity.cases import OptimizerCase, SchedulerCase
from parity.test_optimizers import FIRST_OF_KIND, TABLE
from parity.trajectories import (
    Course,
    assert_same_bits,
    hyperparameters_of,
    initial_parameters,
    local,
    served,
    spec_of,
)
from server_process import running_server

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from optserve.v1.session_pb2 import Session

MESSAGE_BYTES = 1 << 17


def _course(rows: int, others: int) -> Course:
    """Return a course of a model with one parameter that is cut, and one that is not."""
    return Course(
        steps=5,
        epoch_steps=2,
        shapes={
            "scale": (),
            "layer.weight": (rows, 503),
            "layer.bias": (503,),
            "empty": (0, 3),
            "other": (others,),
            "head.weight": (33, 3),
            "head.bias": (1,),
            "one": (1, 1, 1),
            "last": (MESSAGE_BYTES // 2 + 1,),  # More than the message that is held back.
        },
        head=("other", "head.weight", "head.bias", "one"),
        gaps=False,  # What has gaps is answered after its result.
    )


# A little more than the 2 MiB from which steps are answered ahead.
COURSE = _course(701, 211_111)
COURSE_OF_HALVES = _course(1409, 400_003)


class AheadDriver(FormDriver):
    """Sends the last gradients only once the answer has begun."""

    @contextmanager
    def worker(
        self, session_id: str, worker: int = 0, client_id: bytes = b""
    ) -> Iterator[AheadWorker]:
        stream = AheadWorker(self.stub, self.get(session_id))
        with stream.opened(opening(session_id, worker, client_id)):
            yield stream


class AheadWorker(FormWorker):
    """Waits, in the middle of each step, for parameters; or for what announces them."""

    def __init__(self, stub: OptimizerServiceStub, session: Session) -> None:
        super().__init__(stub, session.spec.parameters, "every-parameter")
        # What is not fused comes in whole tensors, which may not be enough to begin with.
        self._awaited: Literal["chunks", "begin"] = "chunks" if _is_fused(session) else "begin"
        self._came = threading.Event()

    def start(self, step: int, gradients: Tensors, digest: bytes = b"") -> Future[StepAnswer]:
        *messages, last = chunks_of(gradients.values(), MESSAGE_BYTES)
        begin = pb.StepBegin(step=step, every_parameter=True, digest=digest)
        self._came.clear()
        self._requests.put(pb.TrainRequest(begin=begin))
        for chunks in messages:
            self._requests.put(pb.TrainRequest(chunks=chunks))
        answer = self.receiver.submit(self._receive, self._headers)
        assert self._came.wait(TIMEOUT_S), "the answer did not begin before the gradients had come"
        self._requests.put(pb.TrainRequest(chunks=last))
        self._requests.put(pb.TrainRequest(end=pb.StepEnd()))
        return answer

    def _next(self) -> pb.TrainResponse:
        response = super()._next()
        if response.HasField(self._awaited):
            self._came.set()
        return response


def _is_fused(session: Session) -> bool:
    kinds = [
        getattr(group.overrides, str(group.overrides.WhichOneof("kind")))
        for group in session.spec.groups
    ]
    return all(getattr(kind, "fused", False) for kind in kinds)


@pytest.fixture(scope="module")
def ahead_driver() -> Iterator[AheadDriver]:
    """Drive a real server that answers ahead, even to clients on its host."""
    with (
        running_server("--overlap", "on") as server,
        AheadDriver(server.address, "every-parameter") as driver,
    ):
        yield driver


def _rows() -> Sequence[object]:
    """Return the whole table; all that meets a schedule is for the tests that take longer."""
    rows = []
    for optimizer, scheduler in TABLE:
        each_once = scheduler is None or optimizer is not FIRST_OF_KIND[optimizer.kind]
        name = f"{optimizer.name}-{scheduler.name if scheduler else 'no-schedule'}"
        marks = () if each_once else (pytest.mark.large,)
        rows.append(pytest.param(optimizer, scheduler, id=name, marks=marks))
    return rows


@pytest.mark.parametrize(("optimizer", "scheduler"), _rows())
def test_steps_answered_ahead_are_those_of_torch(
    ahead_driver: AheadDriver, optimizer: OptimizerCase, scheduler: SchedulerCase | None
) -> None:
    _assert_parity(ahead_driver, optimizer, scheduler, torch.float32, COURSE)


@pytest.mark.parametrize(
    ("dtype", "course"),
    [
        pytest.param(torch.float64, COURSE, id="fp64"),
        pytest.param(torch.bfloat16, COURSE_OF_HALVES, id="bf16"),
        pytest.param(torch.float16, COURSE_OF_HALVES, id="fp16"),
    ],
)
@pytest.mark.parametrize(
    "optimizer", FIRST_OF_KIND.values(), ids=[case.name for case in FIRST_OF_KIND.values()]
)
def test_it_holds_ahead_for_other_data_types(
    ahead_driver: AheadDriver, optimizer: OptimizerCase, dtype: torch.dtype, course: Course
) -> None:
    _assert_parity(ahead_driver, optimizer, None, dtype, course)


def _assert_parity(
    driver: AheadDriver,
    optimizer: OptimizerCase,
    scheduler: SchedulerCase | None,
    dtype: torch.dtype,
    course: Course,
) -> None:
    session = driver.create(spec_of(optimizer, scheduler, 2, dtype, course))
    session_id = session.status.session_id
    driver.upload(session_id, initial_parameters(dtype, course))
    through_server = served(driver, session, scheduler, dtype, course)
    stored = driver.download(session_id)
    driver.delete(session_id)
    hyperparameters = hyperparameters_of(optimizer, session)
    by_torch = local(optimizer, scheduler, hyperparameters, dtype, course=course)
    assert_same_bits(through_server, by_torch)
    for name, value in by_torch.parameters[-1].items():
        assert bytes_of(stored[name]) == bytes_of(value)
