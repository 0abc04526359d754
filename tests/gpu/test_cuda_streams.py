"""Copies beside computations on a CUDA device: what late_device.py stands for where there is none.

What makes them: unit/core/test_staging.py has the same promises, to the bit.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest
import torch
from benchmarks.arena import Effort
from benchmarks.conditions import Conditions
from benchmarks.cuda import ROWS, cuda
from drivers_grpc import StubDriver, served_in_process
from event_loop import TIMEOUT_S
from messages import chunks_of, headers_of
from parity.cases import OptimizerCase
from parity.test_optimizers import FIRST_OF_KIND
from parity.test_overlapped_steps import COURSE, AheadDriver
from parity.trajectories import (
    gradients_of_steps,
    hyperparameters_of,
    initial_parameters,
    local,
    served,
    spec_of,
)
from server_process import running_server
from streams import raw_stream
from torch import Tensor

from optserve.v1.optimizer_pb2 import Adam, Optimizer
from optserve.v1.session_pb2 import SessionSpec
from optserve_server.core.admission import session_bytes
from optserve_server.core.device import Device
from optserve_server.core.limits import Limits
from optserve_server.core.staging import EARLY_BYTES_MIN
from optserve_server.core.streams import Streams
from optserve_server.core.tensors import TensorSpec
from optserve_server.rpc.decode_spec import session_spec

DEVICE = "cuda"
RELATIVE, ABSOLUTE = 1e-5, 1e-6  # As in test_cuda.py.
BUSY_CYCLES = 200_000_000  # A tenth of a second, on any device.
LARGE = TensorSpec(name="large", dtype=torch.float32, shape=(1 << 21,))
LR = 0.1

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(scope="module")
def cuda_driver() -> Iterator[StubDriver]:
    """Drive a server process whose sessions live on the CUDA device."""
    with running_server("--device", DEVICE) as process, StubDriver(process.address) as driver:
        yield driver


@pytest.fixture(scope="module")
def ahead_driver() -> Iterator[AheadDriver]:
    """Drive one that answers ahead of its steps."""
    with (
        running_server("--device", DEVICE, "--overlap", "on") as process,
        AheadDriver(process.address, "every-parameter") as driver,
    ):
        yield driver


@pytest.fixture
def streams() -> Streams:
    """Return the device's."""
    found = Device(DEVICE).streams
    assert found is not None
    return found


def _keep_busy() -> None:
    """Give the device work for a while."""
    torch.cuda._sleep(BUSY_CYCLES)  # type: ignore[no-untyped-call]


def _model() -> list[Tensor]:
    return list(initial_parameters(course=COURSE).values())


def _gradients(step: int) -> list[Tensor]:
    return list(gradients_of_steps(course=COURSE)[step - 1].values())


def _spec(workers: int = 1) -> SessionSpec:
    return SessionSpec(
        parameters=headers_of(initial_parameters(course=COURSE)),
        optimizer=Optimizer(adam=Adam(lr=LR)),
        workers=workers,
    )


def _by_torch(steps: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return what torch makes of steps on the device."""
    parameters = [each.to(DEVICE) for each in _model()]
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)
    for gradients in steps:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.to(DEVICE)
        optimizer.step()
    return [each.cpu() for each in parameters]


def _assert_close(came: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for mine, theirs in zip(came, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=RELATIVE, atol=ABSOLUTE)


def test_a_copy_to_the_device_is_asked_for_and_not_waited_for(streams: Streams) -> None:
    source = torch.randn(LARGE.shape).pin_memory()
    room = streams.room(LARGE)
    torch.cuda.synchronize()
    _keep_busy()
    streams.load([(source, room)])
    streams.loaded()
    twice = room * 2
    assert not torch.cuda.current_stream().query()  # The device is busy still.
    assert torch.equal(twice.cpu(), source * 2)


def test_a_copy_from_the_device_has_what_was_computed_when_it_returns(streams: Streams) -> None:
    mirror = torch.zeros(LARGE.shape).pin_memory()
    value = torch.zeros(LARGE.shape, device=DEVICE)
    _keep_busy()
    value.add_(3)
    streams.unload([(value, mirror)])
    assert torch.equal(mirror, torch.full(LARGE.shape, 3.0))


def test_room_that_was_let_go_is_nobody_elses_before_the_last_copy_to_it(streams: Streams) -> None:
    source = torch.ones(LARGE.shape).pin_memory()
    room = streams.room(LARGE)
    _keep_busy()
    streams.load([(source, room)])
    del room
    other = torch.full(LARGE.shape, 2.0, device=DEVICE)
    torch.cuda.synchronize()
    assert bool((other == 2).all())


@pytest.mark.parametrize(
    "optimizer", FIRST_OF_KIND.values(), ids=[case.name for case in FIRST_OF_KIND.values()]
)
@pytest.mark.parametrize("driver_name", ["cuda_driver", "ahead_driver"], ids=["after", "ahead"])
def test_steps_whose_gradients_are_copied_as_they_come_are_those_of_torch(
    request: pytest.FixtureRequest, driver_name: str, optimizer: OptimizerCase
) -> None:
    assert max(each.nbytes for each in _model()) > EARLY_BYTES_MIN
    driver: StubDriver = request.getfixturevalue(driver_name)
    session = driver.create(spec_of(optimizer, None, 2, course=COURSE))
    driver.upload(session.status.session_id, initial_parameters(course=COURSE))
    through_server = served(driver, session, None, course=COURSE)
    driver.delete(session.status.session_id)
    hyperparameters = hyperparameters_of(optimizer, session)
    by_torch = local(optimizer, None, hyperparameters, device=DEVICE, course=COURSE)
    for came, wanted in zip(through_server.parameters, by_torch.parameters, strict=True):
        _assert_close(list(came.values()), list(wanted.values()))


def test_several_workers_step_with_the_mean_of_their_gradients(cuda_driver: StubDriver) -> None:
    session_id = cuda_driver.create(_spec(workers=3)).status.session_id
    cuda_driver.upload(session_id, initial_parameters(course=COURSE))
    names = [header.name for header in _spec().parameters]
    with ExitStack() as stack:
        workers = [stack.enter_context(cuda_driver.worker(session_id, i)) for i in range(3)]
        answers = [
            workers[i].start(1, dict(zip(names, _gradients(i + 1), strict=True))) for i in (2, 0, 1)
        ]
        came = [answer.result(TIMEOUT_S).parameters for answer in answers]
    cuda_driver.delete(session_id)
    first, second, third = (_gradients(i) for i in (1, 2, 3))
    mean = [(a + b + c) / 3 for a, b, c in zip(first, second, third, strict=True)]
    for parameters in came:
        _assert_close(list(parameters.values()), _by_torch([mean]))


def test_a_step_that_was_given_up_leaves_nothing(cuda_driver: StubDriver) -> None:
    session_id = cuda_driver.create(_spec()).status.session_id
    cuda_driver.upload(session_id, initial_parameters(course=COURSE))
    steps = [_gradients(step) for step in range(1, 4)]
    with raw_stream(cuda_driver, session_id) as stream:
        for step, gradients in enumerate(steps, 1):
            stream.begin(step)
            stream.chunks(list(chunks_of([1000 * each for each in gradients]))[:-1])
            assert stream.step(step, gradients).result is not None
    came = cuda_driver.download(session_id)
    cuda_driver.delete(session_id)
    _assert_close(list(came.values()), _by_torch(steps))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_session_takes_no_more_of_the_device_than_it_has_reserved(workers: int) -> None:
    device = Device(DEVICE)
    reserved = session_bytes(session_spec(_spec(workers), Limits()), device.torch)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with served_in_process(device=device) as address, StubDriver(address) as driver:
        session_id = driver.create(_spec(workers)).status.session_id
        driver.upload(session_id, initial_parameters(course=COURSE))
        names = [header.name for header in _spec().parameters]
        with ExitStack() as stack:
            streams = [stack.enter_context(driver.worker(session_id, i)) for i in range(workers)]
            for step in (1, 2):
                gradients = dict(zip(names, _gradients(step), strict=True))
                for answer in [stream.start(step, gradients) for stream in streams]:
                    answer.result(TIMEOUT_S)
        driver.delete(session_id)
    assert torch.cuda.max_memory_allocated() - before <= reserved
    gc.collect()
    assert torch.cuda.memory_allocated() <= before


def test_the_benchmark_says_what_a_step_costs_over_its_copies_and_its_update() -> None:
    effort = Effort(rounds=2, steps=2, warmup_steps=1)
    findings = cuda(Conditions(effort=effort, thorough=True, threads=1, report=lambda _line: None))
    assert [row.name for row in findings.rows] == list(ROWS)
    assert all(row.measured is not None for row in findings.rows)
