"""Gradients and parameters on their way between the CPU and a device, over a real stream.

The device is the CPU, and copies as late as a device may: see late_device.py.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest
import torch
from drivers import Driver, Worker
from drivers_grpc import StubDriver, StubWorker, served_in_process
from drivers_shared import SharedDriver
from event_loop import TIMEOUT_S
from late_device import LateDevice, StandingDevice
from messages import bytes_of, chunks_of, headers_of
from streams import RawStream, raw_stream
from torch import Tensor

from optserve.v1.optimizer_pb2 import Adam, Optimizer
from optserve.v1.session_pb2 import SessionSpec, Wire
from optserve.v1.tensor_pb2 import Encoding, TensorChunks
from optserve_server.core.admission import session_bytes
from optserve_server.core.device import Device
from optserve_server.core.limits import Limits
from optserve_server.core.staging import EARLY_BYTES_MIN
from optserve_server.rpc.decode_spec import session_spec

SHAPES = {
    "large": (300, 251),
    "small": (7,),
    "other": (2, 70_000),
    "empty": (0, 3),
    "last": (EARLY_BYTES_MIN // 4,),
}
EARLY = 3  # So many of them are copied before the step.
STEPS = 4


def _tensors(seed: int) -> dict[str, Tensor]:
    """Return a tensor for each parameter, the same each time for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def _gradients(seed: int) -> list[Tensor]:
    return list(_tensors(seed).values())


def _spec(
    workers: int = 1, encoding: Encoding.ValueType = Encoding.ENCODING_UNSPECIFIED
) -> SessionSpec:
    return SessionSpec(
        parameters=headers_of(_tensors(0)),
        optimizer=Optimizer(adam=Adam(lr=0.1)),
        workers=workers,
        wire=Wire(gradients=encoding),
    )


@pytest.fixture
def device() -> LateDevice:
    """Copy late."""
    return LateDevice()


@pytest.fixture
def late_driver(device: LateDevice) -> Iterator[StubDriver]:
    """Drive a server whose sessions live on the device."""
    with served_in_process(device=device) as address, StubDriver(address) as driver:
        yield driver


def _chunks(name: str, seed: int) -> list[TensorChunks]:
    """Return the messages that bring one gradient."""
    messages = list(chunks_of([_tensors(seed)[name]], 100_000))
    for message in messages:
        for chunk in message.chunks:
            chunk.tensor = list(SHAPES).index(name)
    return messages


@contextmanager
def _training(driver: StubDriver, spec: SessionSpec | None = None) -> Iterator[RawStream]:
    """Open a stream of a new session."""
    session_id = driver.create(spec or _spec(), _tensors(0)).status.session_id
    with raw_stream(driver, session_id) as stream:
        yield stream


def _until(condition: Callable[[], bool]) -> None:
    """Wait for what the server does a bit later."""
    deadline = time.monotonic() + TIMEOUT_S / 4
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def _workers(driver: Driver, spec: SessionSpec) -> Iterator[list[Worker]]:
    """Open the streams of all workers of a new session."""
    session_id = driver.create(spec, _tensors(0)).status.session_id
    with ExitStack() as stack:
        yield [stack.enter_context(driver.worker(session_id, i)) for i in range(spec.workers)]


def _step(workers: Sequence[Worker], step: int, missing: Sequence[str] = ()) -> list[bytes]:
    """Take a step, the last worker first, without some of its gradients; return the answers."""
    answers = []
    for number, worker in reversed(list(enumerate(workers))):
        gradients = _tensors(10 * step + number)
        if number == len(workers) - 1:
            gradients = {name: each for name, each in gradients.items() if name not in missing}
        answers.append(worker.start(step, gradients))
    came = [answer.result(TIMEOUT_S).parameters.values() for answer in answers]
    return [bytes_of(parameter) for parameters in came for parameter in parameters]


def _trajectory(driver: Driver, workers: int, missing: Sequence[str] = ()) -> list[bytes]:
    """Take some steps of several workers; return what they have led to."""
    with _workers(driver, _spec(workers)) as streams:
        return [each for step in range(1, STEPS + 1) for each in _step(streams, step, missing)]


@pytest.mark.parametrize("missing", [(), ("large", "small")], ids=["all", "some"])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", [LateDevice, StandingDevice], ids=["late", "standing"])
def test_copies_beside_computations_change_no_bit(
    grpc_driver: Driver, kind: Callable[[], Device], workers: int, missing: Sequence[str]
) -> None:
    with served_in_process(device=kind()) as address, StubDriver(address) as driver:
        came = _trajectory(driver, workers, missing)
    assert came == _trajectory(grpc_driver, workers, missing)


def test_a_gradient_is_copied_as_soon_as_its_last_byte_is_there(
    device: LateDevice, late_driver: StubDriver
) -> None:
    large, other, last = (torch.Size(SHAPES[name]) for name in ("large", "other", "last"))

    def copied(*shapes: torch.Size) -> None:
        _until(lambda: len(device.loads.shapes) >= len(shapes))
        assert device.loads.shapes == list(shapes)

    with _training(late_driver) as stream:
        stream.begin(1)
        *beginning, end = _chunks("other", 1)
        stream.chunks(beginning)
        stream.chunks(_chunks("large", 1))
        copied(large)  # What has begun to come before lacks its end.
        stream.chunks([end])
        copied(large, other)
        stream.chunks(_chunks("small", 1) + _chunks("last", 1))
        copied(large, other, last)
        stream.end()
        assert stream.answer().result is not None
        copied(large, other, last)


def test_what_a_given_up_step_has_copied_is_in_no_other(
    grpc_driver: StubDriver, late_driver: StubDriver
) -> None:
    came = []
    for driver, gives_up in ((late_driver, True), (grpc_driver, False)):
        with _training(driver) as stream:
            for step in range(1, STEPS + 1):
                if gives_up:  # Without its last message; and once more, without half of them.
                    messages = list(chunks_of(_gradients(100 + step), 100_000))
                    for count in (len(messages) - 1, len(messages) // 2):
                        stream.begin(step)
                        stream.chunks(messages[:count])
                came.append(stream.step(step, _gradients(step)).parameters)
    assert came[:STEPS] == came[STEPS:]


def test_what_a_refused_step_has_copied_is_in_no_other(
    grpc_driver: StubDriver, late_driver: StubDriver
) -> None:
    came = []
    for driver in (late_driver, grpc_driver):
        with _training(driver) as stream:
            poisoned = _gradients(7)
            poisoned[2][0, -1] = torch.nan
            refusal = stream.step(1, poisoned).refusal
            assert refusal is not None
            assert refusal.reason == "NON_FINITE_GRADIENT"
            came.append(stream.step(1, _gradients(1)).parameters)
    assert came[0] == came[1]


def test_gradients_that_came_rounded_are_copied_once_they_are_decoded(
    grpc_driver: StubDriver, device: LateDevice, late_driver: StubDriver
) -> None:
    rounded = [each.bfloat16() for each in _gradients(1)]
    came = []
    for driver in (late_driver, grpc_driver):
        with _training(driver, _spec(encoding=Encoding.ENCODING_BF16)) as stream:
            came.append(stream.step(1, rounded).parameters)
    assert len(device.loads.shapes) == EARLY
    assert came[0] == came[1]


def test_gradients_in_shared_memory_are_copied_among_computations(
    grpc_driver: Driver, device: LateDevice
) -> None:
    """Their memory is not pinned: to ask for a copy would be to make it."""
    with served_in_process(device=device) as address, SharedDriver(address) as driver:
        came = _trajectory(driver, 2, ["large"])
        with _workers(driver, _spec()) as [worker]:
            assert isinstance(worker, StubWorker)
            StubWorker.start(worker, 1, _tensors(10)).result(TIMEOUT_S)  # In chunks, all the same.
    assert came == _trajectory(grpc_driver, 2, ["large"])
    assert device.loads.shapes == []
    assert device.unloads.shapes


@pytest.mark.parametrize("deleted", [False, True], ids=["worker-leaves", "session-deleted"])
def test_the_room_on_the_device_goes_with_the_worker_and_with_the_session(
    device: LateDevice, late_driver: StubDriver, deleted: bool
) -> None:
    session_id = late_driver.create(_spec(), _tensors(0)).status.session_id
    with raw_stream(late_driver, session_id) as stream:
        for step in range(1, STEPS + 1):
            assert stream.step(step, _gradients(step)).result is not None
        if deleted:
            late_driver.delete(session_id)
        else:
            stream.half_close()

    def gone() -> bool:
        gc.collect()
        return not device.rooms()

    _until(gone)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", [StubDriver, SharedDriver], ids=["grpc", "shm"])
def test_a_session_takes_no_more_of_the_device_than_it_has_reserved(
    device: LateDevice, kind: type[StubDriver], workers: int
) -> None:
    parameters = sum(each.nbytes for each in _gradients(0))
    with (
        served_in_process(device=device) as address,
        kind(address) as driver,
        _workers(driver, _spec(workers)) as streams,
    ):
        for step in range(1, STEPS + 1):
            _step(streams, step)
        rooms = sum(room.nbytes for room in device.rooms())
    assert rooms == workers * parameters  # However many steps there were.
    moments = 2 * parameters  # Adam's.
    reserved = session_bytes(session_spec(_spec(workers), Limits()), device.torch)
    assert reserved >= parameters + moments + rooms
