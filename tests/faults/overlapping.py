"""A server that answers steps while their gradients arrive, and a model large enough for it."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from drivers import Tensors
from drivers_core import registry_on
from drivers_grpc import StubDriver
from event_loop import TIMEOUT_S, EventLoopThread
from google.protobuf.message import Message
from messages import bytes_of, chunks_of
from scenarios.models import STEPS_UNIT, spec
from streams import RawStream, bytes_by_position, raw_stream, reopened_stream
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from optserve.v1.optimizer_pb2 import Adam
from optserve.v1.scheduler_pb2 import ScheduleUnit
from optserve.v1.session_pb2 import SessionSpec
from optserve.v1.tensor_pb2 import TensorChunk, TensorChunks
from optserve_server.core.limits import Limits
from optserve_server.core.registry import SessionRegistry
from optserve_server.core.surroundings import Overlap
from optserve_server.rpc.server import Server

SHAPES = {
    "first": (9,),
    "large": (1100, 701),  # Three pieces, of which the last is ragged.
    "scale": (),
    "empty": (0, 3),
    "second": (400_001,),
    "tail": (77,),
}
RATE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A server in this process, over real sockets."""

    driver: StubDriver
    registry: SessionRegistry
    loop: EventLoopThread

    @contextmanager
    def session(
        self, spec_: SessionSpec | None = None, values: Tensors | None = None
    ) -> Iterator[str]:
        """Create a session with values; afterwards, nothing is left of it, whatever happened."""
        session_id = self.driver.create(spec_ or adam_spec()).status.session_id
        self.driver.upload(session_id, values or model())
        try:
            yield session_id
        finally:
            if any(each.session_id == session_id for each in self.driver.sessions().sessions):
                self.driver.delete(session_id)
        self.until(lambda: self.registry.budget.reserved_bytes == 0)

    @contextmanager
    def stream(self, session_id: str) -> Iterator[RawStream]:
        """Open a stream for a block."""
        with raw_stream(self.driver, session_id) as stream:
            yield stream

    @contextmanager
    def reopened(self, session_id: str) -> Iterator[RawStream]:
        """Open a stream once the server has seen that the last one is gone."""
        with reopened_stream(self.driver, session_id) as stream:
            yield stream

    def tasks(self) -> int:
        """Count what goes on in the server."""
        return self.loop.call(lambda: len(asyncio.all_tasks()))

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what the server does a bit later."""
        deadline = time.monotonic() + TIMEOUT_S / 4
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@contextmanager
def overlapping(limits: Limits | None = None, overlap: Overlap = Overlap.ON) -> Iterator[World]:
    """Serve, and answer ahead."""
    with (
        EventLoopThread() as loop,
        registry_on(loop, limits or Limits(), overlap) as registry,
    ):
        server = loop.call(lambda: Server(registry))
        address = loop.run(server.start("127.0.0.1", 0))
        with StubDriver(address) as driver:
            yield World(driver=driver, registry=registry, loop=loop)
        loop.run(server.stop(0))


def adam_spec(
    scheduler: Message | None = None, unit: ScheduleUnit.ValueType = STEPS_UNIT
) -> SessionSpec:
    """Return the spec of a session of the model, with torch's fused Adam."""
    return spec(Adam(lr=RATE), parameters=model(), scheduler=scheduler, unit=unit)


def model() -> dict[str, Tensor]:
    """Return the parameters, the same each time."""
    return {name: each.clone() for name, each in zip(SHAPES, _random(0), strict=True)}


def gradients(step: int) -> list[Tensor]:
    """Return gradients, in the parameters' order; the same each time for the same step."""
    return list(_random(step))


@functools.cache
def _random(seed: int) -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES.values()]


class Local:
    """The same training by torch alone."""

    def __init__(self) -> None:
        self.parameters = list(model().values())
        self.optimizer = torch.optim.Adam(self.parameters, lr=RATE, fused=True)

    def step(self, number: int) -> dict[int, bytes]:
        """Take a step; return the bytes of the parameters, by position."""
        for parameter, gradient in zip(self.parameters, gradients(number), strict=True):
            parameter.grad = gradient.clone()
        self.optimizer.step()
        return self.bytes()

    def bytes(self) -> dict[int, bytes]:
        """Return the bytes of the parameters as they are, by position."""
        return bytes_by_position(self.parameters)


def are_gone(tensors: Sequence[Tensor]) -> Callable[[], bool]:
    """Return what tells whether nothing keeps the memory of any of the tensors."""
    kept = [StorageWeakRef(each.untyped_storage()) for each in tensors]  # type: ignore[no-untyped-call]
    return lambda: all(each.expired() for each in kept)  # type: ignore[no-untyped-call]


def halves(step: int) -> tuple[list[TensorChunks], list[TensorChunks]]:
    """Return a step's gradients as messages: so much that an answer begins, and the rest."""
    messages = list(chunks_of(gradients(step), 1 << 17))
    middle = len(messages) * 3 // 4
    return messages[:middle], messages[middle:]


def begin_half(stream: RawStream, step: int) -> list[TensorChunks]:
    """Send a part of a step; return the rest."""
    sent, rest = halves(step)
    stream.begin(step)
    stream.chunks(sent)
    return rest


def slices(step: int, chunk_bytes: int = 100_003) -> list[list[TensorChunks]]:
    """Return messages of one chunk each, by tensor; the chunks cut elements."""
    return [
        [
            TensorChunks(
                chunks=[TensorChunk(tensor=position, offset=at, data=data[at : at + chunk_bytes])]
            )
            for at in range(0, len(data), chunk_bytes)
        ]
        for position, data in enumerate(map(bytes_of, gradients(step)))
    ]


def disturb(stream: RawStream, number: int) -> bool:
    """Leave the first step in the middle, in one of five ways; return whether the stream stays."""
    begin_half(stream, 1)
    match number % 5:
        case 0:
            stream.receive_ahead()  # The next begin gives it up.
        case 1:
            pass  # And this one before anything was read.
        case 2:
            stream.end()
            assert _reason(stream) == "BYTE_COUNT_MISMATCH"
        case 3:
            stream.begin(7)
            assert _reason(stream) == "STEP_OUT_OF_ORDER"
        case 4:
            stream.receive_ahead()
            stream.cancel()
            return False
    return True


def disturb_often(driver: StubDriver, session_id: str, times: int) -> None:
    """Disturb the first step of a session so often; then take it."""
    numbers = iter(range(times))
    while True:
        with reopened_stream(driver, session_id) as stream:
            if all(disturb(stream, number) for number in numbers):
                assert stream.step(1, gradients(1)).parameters == Local().step(1)
                return


def _reason(stream: RawStream) -> str:
    refusal = stream.answer().refusal
    return refusal.reason if refusal else ""
