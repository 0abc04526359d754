"""A worker's stream, event by event: for what no client that does well would send."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue

from drivers_grpc import StubDriver, opening
from event_loop import TIMEOUT_S
from messages import bytes_of, chunks_of
from refusals import RefusedError, translated
from torch import Tensor

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.tensor_pb2 import Encoding, TensorChunks


@dataclass(slots=True, kw_only=True)
class Answer:
    """What has come of an answer."""

    begins: int = 0
    encoding: Encoding.ValueType = Encoding.ENCODING_UNSPECIFIED
    result: pb.StepResult | None = None
    refusal: RefusedError | None = None
    _came: dict[int, bytearray] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[int, bytes]:
        """The bytes of each parameter, as they travelled, by position."""
        return {position: bytes(data) for position, data in self._came.items()}

    def take(self, response: pb.TrainResponse) -> None:
        """Add one response."""
        match response.WhichOneof("event"):
            case "begin":
                self.begins += 1
                self.encoding, self._came = response.begin.encoding, {}
            case "chunks":
                for chunk in response.chunks.chunks:
                    came = self._came.setdefault(chunk.tensor, bytearray())
                    assert chunk.offset == len(came)
                    came += chunk.data
            case "result":
                self.result = response.result
            case "packed":
                self.begins, self.encoding = self.begins + 1, response.packed.encoding
                self._came = dict(enumerate(map(bytearray, response.packed.parameters)))
                self.result = response.packed.result
            case "refused":
                self.refusal = RefusedError.from_message(response.refused.refusal)
            case other:
                raise AssertionError(other)

    @property
    def byte_count(self) -> int:
        """How many bytes of parameters have come."""
        return sum(map(len, self._came.values()))


class RawStream:
    """Sends what it is told to, and reads only when it is told to."""

    def __init__(
        self,
        driver: StubDriver,
        session_id: str,
        client_id: bytes = b"",
        worker: int = 0,
        *,
        shared_memory: bool = False,
    ) -> None:
        self._requests: SimpleQueue[pb.TrainRequest | None] = SimpleQueue()
        self._responses = driver.stub.Train(iter(self._requests.get, None), timeout=TIMEOUT_S)
        self._answer = Answer()
        asked = opening(session_id, worker, client_id)
        asked.shared_memory = shared_memory
        self.send(open=asked)
        with translated():
            self.opened = next(self._responses).opened
        self.status = self.opened.status

    def send(self, **event: object) -> None:
        """Send one event."""
        self._requests.put(pb.TrainRequest(**event))  # type: ignore[arg-type] # By its name.

    def begin(self, step: int, digest: bytes = b"") -> None:
        """Begin a step that has a gradient for every parameter."""
        self.send(begin=pb.StepBegin(step=step, every_parameter=True, digest=digest))

    def chunks(self, messages: Sequence[TensorChunks]) -> None:
        """Send chunks of gradients."""
        for message in messages:
            self.send(chunks=message)

    def end(self, digest: bytes = b"") -> None:
        """End the step."""
        self.send(end=pb.StepEnd(digest=digest))

    def step(self, step: int, gradients: Sequence[Tensor]) -> Answer:
        """Take a whole step."""
        self.begin(step)
        self.chunks(list(chunks_of(gradients)))
        self.end()
        return self.answer()

    def receive(self) -> pb.TrainResponse:
        """Wait for one response."""
        with translated():
            return next(self._responses)

    def receive_ahead(self, byte_count: int = 1) -> Answer:
        """Wait until so much of an answer has come that has not come to its end."""
        while self._answer.byte_count < byte_count:
            self._answer.take(self.receive())
            assert self._answer.result is None, "the answer has come to its end"
            assert self._answer.refusal is None, self._answer.refusal
        return self._answer

    def answer(self) -> Answer:
        """Wait for the end of an answer; what has come of it may belong to steps given up."""
        answer = self._answer
        while answer.result is None and answer.refusal is None:
            answer.take(self.receive())
        self._answer = Answer()
        return answer

    def half_close(self) -> list[pb.TrainResponse]:
        """Send no more; return whatever still comes."""
        self._requests.put(None)
        with translated():
            return list(self._responses)

    def cancel(self) -> None:
        """Break the stream off."""
        self._requests.put(None)
        self._responses.cancel()


@contextmanager
def raw_stream(
    driver: StubDriver,
    session_id: str,
    client_id: bytes = b"",
    worker: int = 0,
    *,
    shared_memory: bool = False,
) -> Iterator[RawStream]:
    """Open a stream for a block; whatever goes on is broken off at its end."""
    stream = RawStream(driver, session_id, client_id, worker, shared_memory=shared_memory)
    try:
        yield stream
    finally:
        stream.cancel()


@contextmanager
def reopened_stream(driver: StubDriver, session_id: str, worker: int = 0) -> Iterator[RawStream]:
    """Open a stream once the server has seen that the last one is gone."""
    deadline = time.monotonic() + TIMEOUT_S / 2
    with ExitStack() as stack:
        while True:
            try:
                stream = stack.enter_context(raw_stream(driver, session_id, worker=worker))
                break
            except RefusedError as error:
                if error.reason != "WORKER_BUSY" or time.monotonic() > deadline:
                    raise
                time.sleep(0.005)
        yield stream


def bytes_by_position(parameters: Sequence[Tensor]) -> dict[int, bytes]:
    """Return what an answer holds that brings these parameters, unencoded."""
    return {position: data for position, each in enumerate(parameters) if (data := bytes_of(each))}
