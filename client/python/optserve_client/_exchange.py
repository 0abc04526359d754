"""Conversations over a stream, as state machines without I/O.

An exchange says which messages to send, and is given each message that comes until it says that it
is over. It knows neither sockets nor clocks nor threads; the blocking and the asyncio driver move
its messages. What is refused by the server is kept in the exchange; a ProtocolError means that the
answer cannot be understood, and the stream is of no further use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, Protocol

from google.protobuf.message import Message

from optserve.limits import CHUNK_BYTES_MAX
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.error_pb2 import Refusal
from optserve.v1.session_pb2 import SessionStatus
from optserve.v1.tensor_pb2 import TensorChunks, TensorHeader
from optserve.wire import Assembly, FramingError, split
from optserve_client.errors import ProtocolError
from optserve_client.tensors import Array, allocate, bytes_of

# What is larger goes by stream: a long message holds up the server's other clients.
INLINE_BYTES_MAX = CHUNK_BYTES_MAX


def _nothing(_count: int) -> None:
    """Be told of bytes that nobody counts."""


class Incoming:
    """Tensors that are arriving in chunks, after their headers."""

    def __init__(
        self, headers: Sequence[TensorHeader], advance: Callable[[int], None] = _nothing
    ) -> None:
        """Make room for what ``headers`` say; they must have been checked."""
        # New arrays each time: what came before stays as it is, for whoever still looks at it, and
        # if this breaks off.
        self._arrays = allocate(headers)
        self._assembly = Assembly([bytes_of(array) for array in self._arrays])
        self._advance = advance

    def add(self, chunks: TensorChunks) -> None:
        """Write chunks where they belong."""
        try:
            count = self._assembly.add(chunks.chunks)
        except FramingError as error:
            raise ProtocolError(f"the server's chunks are wrong: {error}") from error
        self._advance(count)

    def finish(self) -> list[Array]:
        """Return the tensors, read-only, once all their bytes have come."""
        try:
            self._assembly.finish()
        except FramingError as error:
            raise ProtocolError(f"the server's chunks are incomplete: {error}") from error
        for array in self._arrays:
            array.flags.writeable = False
        return self._arrays


class TrainExchange(Protocol):
    """One conversation of the stream that a worker's steps share."""

    def requests(self) -> Iterator[pb.TrainRequest]:
        """Yield what to send. Stops early once there is no more use in it."""
        ...

    def receive(self, response: pb.TrainResponse) -> bool:
        """Take a message, and return whether the conversation is over."""
        ...


class Opening:
    """The opening of a worker's stream."""

    def __init__(self, session_id: str, worker: int) -> None:
        self._request = pb.TrainOpen(session_id=session_id, worker=worker)
        self.status: SessionStatus | None = None

    def requests(self) -> Iterator[pb.TrainRequest]:
        """Yield the one message that opens the stream."""
        yield pb.TrainRequest(open=self._request)

    def receive(self, response: pb.TrainResponse) -> bool:
        """Take the answer; its status says where the session stands."""
        if response.WhichOneof("event") != "opened":
            _unexpected(response, "opened")
        self.status = response.opened.status
        return True


class Step:
    """One step: begin, gradient chunks, end; begin, parameter chunks, result, or a refusal."""

    def __init__(
        self,
        begin: pb.StepBegin,
        gradients: Sequence[memoryview],
        parameters: Sequence[TensorHeader],
        *,
        chunk_bytes: int,
    ) -> None:
        """Take the step that ``begin`` announces.

        Args:
            begin: The step's number and the headers of the gradients.
            gradients: The gradients' bytes, in that order. Must not change until the step is over.
            parameters: Headers of the parameters that the answer must announce.
            chunk_bytes: Most tensor bytes in one message.
        """
        self._begin = begin
        self._gradients = gradients
        self._parameters = parameters
        self._chunk_bytes = chunk_bytes
        self._incoming: Incoming | None = None
        self.result: pb.StepResult | None = None
        self.parameters: list[Array] | None = None
        self.refusal: Refusal | None = None

    def requests(self) -> Iterator[pb.TrainRequest]:
        """Yield the step's messages; after a refusal no more: the server would ignore them."""
        yield pb.TrainRequest(begin=self._begin)
        for chunks in split(self._gradients, self._chunk_bytes):
            if self.refusal is not None:
                return
            yield pb.TrainRequest(chunks=chunks)
        yield pb.TrainRequest(end=pb.StepEnd())

    def receive(self, response: pb.TrainResponse) -> bool:
        """Take a message of the answer; the step is over with its result, or with a refusal.

        The parameters count from then on: a refusal takes back those that had come.
        """
        match response.WhichOneof("event"):
            case "refused" if response.refused.step == self._begin.step:
                self.refusal = response.refused.refusal
            case "begin" if self._incoming is None and response.begin.step == self._begin.step:
                check_announced(response.begin.parameters, self._parameters)
                self._incoming = Incoming(self._parameters)
            case "chunks" if self._incoming is not None:
                self._incoming.add(response.chunks)
            case "result" if self._incoming is not None and (
                response.result.step == self._begin.step
            ):
                self.parameters = self._incoming.finish()
                self.result = response.result
            case _:
                _unexpected(response, f"the answer to step {self._begin.step}")
        return self.refusal is not None or self.result is not None


class Download:
    """Parameters that come, after their headers, until the end of the stream."""

    def __init__(
        self, parameters: Sequence[TensorHeader], advance: Callable[[int], None] = _nothing
    ) -> None:
        """Expect exactly ``parameters``, in that order."""
        self._parameters = parameters
        self._advance = advance
        self._incoming: Incoming | None = None
        self.steps = 0

    def receive(self, response: pb.DownloadParametersResponse) -> None:
        """Take a message."""
        match response.WhichOneof("event"):
            case "begin" if self._incoming is None:
                check_announced(response.begin.parameters, self._parameters)
                self.steps = response.begin.steps
                self._incoming = Incoming(self._parameters, self._advance)
            case "chunks" if self._incoming is not None:
                self._incoming.add(response.chunks)
            case _:
                _unexpected(response, "begin, then chunks")

    def finish(self) -> list[Array]:
        """Return the parameters, once the stream has ended."""
        if self._incoming is None:
            raise ProtocolError("the server ended the download before it began")
        return self._incoming.finish()


class LossEvaluation:
    """A loss of tensors of any size: begin, chunks; evaluated, chunks until the end."""

    def __init__(
        self, begin: pb.LossBegin, tensors: Sequence[memoryview], *, chunk_bytes: int
    ) -> None:
        """Evaluate what ``begin`` announces; ``tensors`` are predictions and targets."""
        self._begin = begin
        self._tensors = tensors
        self._chunk_bytes = chunk_bytes
        self._names: list[str] = []
        self._incoming: Incoming | None = None
        self.result: pb.LossResult | None = None

    def requests(self) -> Iterator[pb.EvaluateLossStreamRequest]:
        """Yield what to send; the client's half-close follows."""
        yield pb.EvaluateLossStreamRequest(begin=self._begin)
        for chunks in split(self._tensors, self._chunk_bytes):
            yield pb.EvaluateLossStreamRequest(chunks=chunks)

    def receive(self, response: pb.EvaluateLossStreamResponse) -> None:
        """Take a message."""
        match response.WhichOneof("event"):
            case "evaluated" if self._incoming is None:
                headers = list(response.evaluated.tensors)
                for header in headers:
                    check_loss_tensor(header.name, header, self._begin.predictions)
                self._names = [header.name for header in headers]
                self._incoming = Incoming(headers)
                self.result = response.evaluated.result
            case "chunks" if self._incoming is not None:
                self._incoming.add(response.chunks)
            case _:
                _unexpected(response, "evaluated, then chunks")

    def finish(self) -> dict[str, Array]:
        """Return the answer's tensors by name, once the stream has ended."""
        if self._incoming is None:
            raise ProtocolError("the server ended the evaluation before it answered")
        return dict(zip(self._names, self._incoming.finish(), strict=True))


def upload_requests(
    begin: pb.UploadBegin,
    tensors: Sequence[memoryview],
    *,
    chunk_bytes: int,
    advance: Callable[[int], None] = _nothing,
) -> Iterator[pb.UploadParametersRequest]:
    """Yield the messages of an upload of ``tensors``; the client's half-close follows."""
    yield pb.UploadParametersRequest(begin=begin)
    left = sum(len(tensor) for tensor in tensors)
    for chunks in split(tensors, chunk_bytes):
        yield pb.UploadParametersRequest(chunks=chunks)
        count = min(left, chunk_bytes)  # Every message but the last one is full.
        left -= count
        advance(count)


def check_announced(announced: Sequence[TensorHeader], expected: Sequence[TensorHeader]) -> None:
    """Check that the server sends the tensors that it should, before memory is taken for them."""
    if list(announced) != list(expected):
        names = ", ".join(header.name for header in announced)
        raise ProtocolError(f"the server announced other tensors than it was asked for: {names}")


def check_loss_tensor(name: str, header: TensorHeader, predictions: TensorHeader) -> None:
    """Check a tensor of the answer: of the predictions' data type, and no larger than they are."""
    same_shape = header.shape == predictions.shape
    fits = (
        name == "elements"
        and min(header.shape, default=0) >= 0
        and math.prod(header.shape) <= math.prod(predictions.shape)
    )
    if header.data_type != predictions.data_type or not (same_shape or fits):
        raise ProtocolError(f"the server's '{name}' does not belong to the predictions")


def _unexpected(response: Message, expected: str) -> NoReturn:
    event = response.WhichOneof("event")
    raise ProtocolError(
        f"the server sent {event or 'an empty event'} where {expected} should have come",
        expected=expected,
        actual=str(event or ""),
    )
