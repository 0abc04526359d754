"""Conversations over a stream, as state machines without I/O.

An exchange says which messages to send, and is given each message that comes until it says that it
is over. It knows neither sockets nor clocks nor threads; the blocking and the asyncio driver move
its messages. What is refused by the server is kept in the exchange; a ProtocolError means that the
answer cannot be understood, and the stream is of no further use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn, Protocol, TypeAlias

from google.protobuf.message import Message

from optserve.limits import CHUNK_BYTES_MAX
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.error_pb2 import Refusal
from optserve.v1.tensor_pb2 import TensorHeader
from optserve.wire import Chunk, Source, split, whole
from optserve_client._digest import StepDigest
from optserve_client._encoded import parameter_targets
from optserve_client._feed import FeedClosedError
from optserve_client._incoming import Incoming, Room, arrays_of, uncounted
from optserve_client.errors import ProtocolError
from optserve_client.tensors import Array

TrainEvent: TypeAlias = pb.TrainRequest | list[Chunk]
TrainAnswer: TypeAlias = pb.TrainResponse | list[Chunk]

# What is larger goes by stream: a long message holds up the server's other clients.
INLINE_BYTES_MAX = CHUNK_BYTES_MAX


class TrainExchange(Protocol):
    """One conversation of the stream that a worker's steps share."""

    def requests(self) -> Iterator[TrainEvent]:
        """Yield what to send. Stops early once there is no more use in it."""
        ...

    def receive(self, response: TrainAnswer) -> bool:
        """Take a message, and return whether the conversation is over."""
        ...


class StepExchange(TrainExchange, Protocol):
    """One step, in whichever form."""

    digest: bytes
    """What identifies the step's content, once all of it has been handed to the network."""
    is_sent: bool
    """Whether that has happened."""
    result: pb.StepResult | None
    refusal: Refusal | None


class Opening:
    """The opening of a worker's stream."""

    def __init__(
        self, session_id: str, worker: int, *, client_id: bytes = b"", shared_memory: bool = False
    ) -> None:
        """Open the stream of ``worker``, and ask for shared memory or not.

        An open one of the same ``client_id`` ends, which the server may not have noticed to be
        broken.
        """
        self._request = pb.TrainOpen(
            session_id=session_id, worker=worker, shared_memory=shared_memory, client_id=client_id
        )
        self.opened: pb.TrainOpened | None = None
        """The answer, once the stream has been opened with this; it may be open already."""

    def requests(self) -> Iterator[TrainEvent]:
        """Yield the one message that opens the stream."""
        yield pb.TrainRequest(open=self._request)

    def receive(self, response: TrainAnswer) -> bool:
        """Take the answer, which says where the session stands."""
        if isinstance(response, list) or response.WhichOneof("event") != "opened":
            _unexpected(response, "opened")
        self.opened = response.opened
        return True


class Step:
    """One step: begin, gradient chunks, end; begin, parameter chunks, result, or a refusal."""

    def __init__(
        self,
        begin: pb.StepBegin,
        gradients: Iterable[list[Chunk]],
        headers: Sequence[TensorHeader],
        room: Room,
        *,
        digest: StepDigest | None = None,
        reference: Sequence[Array] | None = None,
    ) -> None:
        """Take the step that ``begin`` announces.

        Args:
            begin: The step's number, and which gradients follow.
            gradients: Their chunks, message by message. Asked for by the thread that sends, which
                may have to wait for them; a FeedClosedError gives the step up.
            headers: Of the parameters that the answer must announce, if it announces any.
            room: For the parameters.
            digest: Through which the gradients go when they are asked for. None: ``begin`` has all
                there is.
            reference: See ``parameter_targets``.
        """
        self.digest = begin.digest
        self.is_sent = False
        self._begin = begin
        self._digest = digest
        self._gradients = gradients
        self._announced = [] if begin.every_parameter else headers
        self._room = room
        self._reference = reference
        self._incoming: Incoming | None = None
        self.result: pb.StepResult | None = None
        self.parameters: list[Array] | None = None
        self.refusal: Refusal | None = None

    def requests(self) -> Iterator[TrainEvent]:
        """Yield the step's messages; after a refusal no more: the server would ignore them."""
        yield pb.TrainRequest(begin=self._begin)
        try:
            for chunks in self._gradients:
                if self.refusal is not None:
                    return
                yield chunks
        except FeedClosedError:
            if self.refusal is None:
                raise
            return
        end = pb.StepEnd()
        if self._digest is not None:
            self.digest = end.digest = self._digest.value()
        self.is_sent = True
        yield pb.TrainRequest(end=end)

    def receive(self, response: TrainAnswer) -> bool:
        """Take a message of the answer; the step is over with its result, or with a refusal.

        The parameters count from then on: a refusal takes back those that had come.
        """
        if isinstance(response, list):
            if self._incoming is None:
                _unexpected(response, f"the answer to step {self._begin.step}")
            self._incoming.add(response)
            return False
        match response.WhichOneof("event"):
            case "refused" if response.refused.step == self._begin.step:
                self.refusal = response.refused.refusal
            case "begin" if response.begin.step == self._begin.step:
                # A second one takes back what came after the first.
                check_announced(response.begin.parameters, self._announced)
                self._incoming = Incoming(
                    self._room,
                    targets=parameter_targets(
                        response.begin.encoding, self._room.buffers, self._reference
                    ),
                )
            case "result" if self._incoming is not None and (
                response.result.step == self._begin.step
            ):
                self.parameters = self._incoming.finish()
                self.result = response.result
            case _:
                _unexpected(response, f"the answer to step {self._begin.step}")
        return self.refusal is not None or self.result is not None


class PackedStep:
    """One step of a small model, in one message each way."""

    def __init__(
        self,
        step: int,
        gradients: Sequence[Source],
        headers: Sequence[TensorHeader],
        digest: StepDigest,
        reference: Sequence[Array] | None = None,
    ) -> None:
        """Take step ``step``.

        Args:
            step: Its number.
            gradients: Of every parameter, in the session's order.
            headers: Of the parameters.
            digest: Through which the gradients go when they are read.
            reference: See ``parameter_targets``.
        """
        # copy: gradients to bytes; protobuf copies them once more.
        data = [whole(each) for each in gradients]
        self.digest = digest.value()
        self.is_sent = False
        self._packed = pb.PackedStep(step=step, gradients=data, digest=self.digest)
        self._headers = headers
        self._reference = reference
        self.result: pb.StepResult | None = None
        self.parameters: list[Array] | None = None
        self.refusal: Refusal | None = None

    def requests(self) -> Iterator[TrainEvent]:
        """Yield the one message."""
        self.is_sent = True
        yield pb.TrainRequest(packed=self._packed)

    def receive(self, response: TrainAnswer) -> bool:
        """Take the answer, or a refusal."""
        event = "chunks" if isinstance(response, list) else response.WhichOneof("event")
        if isinstance(response, list) or event not in ("packed", "refused"):
            _unexpected(response, f"the answer to step {self._packed.step}")
        if event == "refused" and response.refused.step == self._packed.step:
            self.refusal = response.refused.refusal
            return True
        packed = response.packed
        if packed.result.step != self._packed.step or len(packed.parameters) != len(self._headers):
            _unexpected(response, f"the parameters after step {self._packed.step}")
        self.parameters = arrays_of(
            self._headers, packed.parameters, packed.encoding, self._reference
        )
        self.result = packed.result
        return True


class SharedStep:
    """One step in shared memory: a message each way, without tensors."""

    def __init__(self, step: int, absent: Sequence[int], digest: bytes) -> None:
        """Take step ``step``; the parameters at the positions ``absent`` have no gradient."""
        self.digest = digest
        self.is_sent = False
        self._shared = pb.SharedStep(step=step, absent=absent, digest=digest)
        self.result: pb.StepResult | None = None
        self.refusal: Refusal | None = None

    def requests(self) -> Iterator[TrainEvent]:
        """Yield the one message."""
        self.is_sent = True
        yield pb.TrainRequest(shared=self._shared)

    def receive(self, response: TrainAnswer) -> bool:
        """Take the result, or a refusal."""
        event = "chunks" if isinstance(response, list) else response.WhichOneof("event")
        if isinstance(response, list) or event not in ("result", "refused"):
            _unexpected(response, f"the result of step {self._shared.step}")
        if event == "refused":
            self.refusal = response.refused.refusal
        else:
            self.result = response.result
        return True


class Download:
    """Parameters that come, after their headers, until the end of the stream."""

    def __init__(
        self, parameters: Sequence[TensorHeader], advance: Callable[[int], None] = uncounted
    ) -> None:
        """Expect exactly ``parameters``, in that order."""
        self._parameters = parameters
        self._advance = advance
        self._incoming: Incoming | None = None
        self.steps = 0

    def receive(self, response: pb.DownloadParametersResponse | list[Chunk]) -> None:
        """Take a message."""
        if isinstance(response, list):
            if self._incoming is None:
                _unexpected(response, "begin, then chunks")
            self._incoming.add(response)
            return
        if response.WhichOneof("event") != "begin" or self._incoming is not None:
            _unexpected(response, "begin, then chunks")
        check_announced(response.begin.parameters, self._parameters)
        self.steps = response.begin.steps
        # New arrays each time: what came before stays as it is, for whoever still looks at it.
        self._incoming = Incoming(Room(self._parameters), self._advance)

    def finish(self) -> list[Array]:
        """Return the parameters, once the stream has ended."""
        if self._incoming is None:
            raise ProtocolError("the server ended the download before it began")
        return self._incoming.finish()


class LossEvaluation:
    """A loss of tensors of any size: begin, chunks; evaluated, chunks until the end."""

    def __init__(self, begin: pb.LossBegin, tensors: Sequence[Source], *, chunk_bytes: int) -> None:
        """Evaluate what ``begin`` announces; ``tensors`` are predictions and targets."""
        self._begin = begin
        self._tensors = tensors
        self._chunk_bytes = chunk_bytes
        self._names: list[str] = []
        self._incoming: Incoming | None = None
        self.result: pb.LossResult | None = None

    def requests(self) -> Iterator[pb.EvaluateLossStreamRequest | list[Chunk]]:
        """Yield what to send; the client's half-close follows."""
        yield pb.EvaluateLossStreamRequest(begin=self._begin)
        yield from split(self._tensors, self._chunk_bytes)

    def receive(self, response: pb.EvaluateLossStreamResponse | list[Chunk]) -> None:
        """Take a message."""
        if isinstance(response, list):
            if self._incoming is None:
                _unexpected(response, "evaluated, then chunks")
            self._incoming.add(response)
            return
        if response.WhichOneof("event") != "evaluated" or self._incoming is not None:
            _unexpected(response, "evaluated, then chunks")
        headers = list(response.evaluated.tensors)
        for header in headers:
            check_loss_tensor(header.name, header, self._begin.predictions)
        self._names = [header.name for header in headers]
        self._incoming = Incoming(Room(headers))
        self.result = response.evaluated.result

    def finish(self) -> dict[str, Array]:
        """Return the answer's tensors by name, once the stream has ended."""
        if self._incoming is None:
            raise ProtocolError("the server ended the evaluation before it answered")
        return dict(zip(self._names, self._incoming.finish(), strict=True))


def upload_requests(
    begin: pb.UploadBegin,
    tensors: Sequence[Source],
    *,
    chunk_bytes: int,
    advance: Callable[[int], None] = uncounted,
) -> Iterator[pb.UploadParametersRequest | list[Chunk]]:
    """Yield the messages of an upload of ``tensors``; the client's half-close follows."""
    yield pb.UploadParametersRequest(begin=begin)
    for chunks in split(tensors, chunk_bytes):
        yield chunks
        advance(sum(len(chunk.data) for chunk in chunks))


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


def _unexpected(response: Message | list[Chunk], expected: str) -> NoReturn:
    event = "chunks" if isinstance(response, list) else response.WhichOneof("event")
    raise ProtocolError(
        f"the server sent {event or 'an empty event'} where {expected} should have come",
        expected=expected,
        actual=str(event or ""),
    )
