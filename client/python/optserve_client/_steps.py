"""The ways in which a worker's steps travel: in chunks, packed, in shared memory, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from optserve.limits import MESSAGE_BYTES_MAX, MESSAGE_HEADROOM_BYTES
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.session_pb2 import Session
from optserve.v1.tensor_pb2 import Tensor, TensorHeader
from optserve.wire import Chunk, byte_count, split, whole
from optserve_client import _exchange as exchanges
from optserve_client._effects import Operation, Train, ask
from optserve_client._encoded import GradientSources
from optserve_client._feed import Feed
from optserve_client._incoming import Room, arrays_of
from optserve_client._refusals import from_refusal
from optserve_client._shared_lane import SharedLane
from optserve_client._terms import Terms
from optserve_client.errors import LimitError, SharedMemoryError
from optserve_client.tensors import Array, bytes_of, encode_as, form_of

Taking: TypeAlias = Operation[tuple[pb.StepResult, list[Array]]]
"""Takes a step: returns what it did, and the parameters after it, in the session's order."""


class StepWays:
    """The ways in which one worker takes its steps, and what a step leaves behind for the next."""

    def __init__(self, session: Session, *, terms: Terms, worker: int) -> None:
        """Take steps in ``session`` as ``worker``."""
        self._session_id = session.status.session_id
        self._worker = worker
        self._terms = terms
        self._headers = list(session.spec.parameters)
        self._forms = {header.name: form_of(header) for header in self._headers}
        # Of what steps bring: one holds the newest values, and the other waits for the next ones.
        self._rooms: list[Room] = []
        self._shared = SharedLane(self._headers)
        self._gradients = GradientSources(session.spec.wire.gradients)
        # What the answer to the last streamed step has brought: the next one may build on it.
        self._reference: list[Array] | None = None
        self.packs = total_bytes(self._headers) <= terms.chunk_bytes
        """Whether a step with every gradient is one message each way, if it has to travel."""

    @property
    def buffers(self) -> list[Array]:
        """Arrays that gradients are best written to, once the worker's stream has been opened."""
        return self._shared.buffers

    def bytes_of(self, header: TensorHeader, gradient: ArrayLike, at: int) -> memoryview:
        """Return the bytes of a gradient, the one at position ``at`` of a step.

        Raises:
            RequestError: It does not fit the parameter that ``header`` describes.
        """
        values = np.asarray(gradient)
        if (values.dtype, values.shape) == self._forms[header.name]:
            return bytes_of(values)
        return encode_as(header, values, role="gradient", path=f"gradients[{at}]")

    def open(self, timeout_s: float) -> Operation[pb.TrainOpened | None]:
        """Open the worker's stream, and enter the lane; None if the stream is open already.

        Raises:
            SharedMemoryError: There is no shared memory, and it must be.
        """
        opening = self._opening()
        yield Train(opening=opening, exchange=None, timeout_s=timeout_s)
        if opening.opened:
            self._shared.take(opening.opened)
        if self._terms.config.lane == "shm" and self._shared.closed_because:
            raise SharedMemoryError(f"no shared memory: {self._shared.closed_because}")
        return opening.opened

    def streamed(
        self, number: int, headers: Sequence[TensorHeader], tensors: Sequence[memoryview]
    ) -> Taking:
        """Take step ``number`` on the worker's stream, with the gradients of some parameters."""
        yield from self.open(self._terms.config.step_timeout_s)
        if not self._shared.closed_because:
            return (yield from self._shared_step(number, headers, tensors))
        sources = self._gradients.of(number, [header.name for header in headers], tensors)
        if len(headers) == len(self._headers) and self.packs:
            step = exchanges.PackedStep(number, sources, self._headers, self._reference)
            return (yield from self._converse(number, step))
        return (yield from self._chunked(number, headers, split(sources, self._terms.chunk_bytes)))

    def fed(self, number: int, feed: Feed) -> Taking:
        """Take step ``number`` on the worker's stream, with gradients as they become ready."""
        yield from self.open(self._terms.config.step_timeout_s)
        if self._shared.closed_because:
            chunks = feed.chunks(self._gradients.begin(number), self._terms.chunk_bytes)
            headers = [header for header in self._headers if header.name in feed.names]
            return (yield from self._chunked(number, headers, chunks))
        absent = {header.name: position for position, header in enumerate(self._headers)}
        present = [absent.pop(name) for name in feed.names]
        for position, gradient in feed.gradients():
            self._shared.write(present[position], gradient)
        feed.wait_for_end()
        return (yield from self._written(number, list(absent.values())))

    def unary(
        self, number: int, headers: Sequence[TensorHeader], tensors: Sequence[memoryview]
    ) -> Taking:
        """Take step ``number`` in one message each way."""
        check_unary_fits(self._headers)
        sources = self._gradients.of(number, [header.name for header in headers], tensors)
        request = pb.StepRequest(
            session_id=self._session_id,
            worker=self._worker,
            step=number,
            gradients=[
                Tensor(header=header, data=whole(source))
                for header, source in zip(headers, sources, strict=True)
            ],
        )
        timeout_s = self._terms.config.step_timeout_s
        response = yield from ask("Step", request, pb.StepResponse, timeout_s)
        exchanges.check_announced([tensor.header for tensor in response.parameters], self._headers)
        data = [tensor.data for tensor in response.parameters]
        arrays = arrays_of(self._headers, data, response.encoding)
        self._gradients.answered(number)
        return response.result, arrays

    def _shared_step(
        self, number: int, headers: Sequence[TensorHeader], tensors: Sequence[memoryview]
    ) -> Taking:
        present = {header.name: tensor for header, tensor in zip(headers, tensors, strict=True)}
        absent = []
        for position, header in enumerate(self._headers):
            if header.name in present:
                self._shared.write(position, present[header.name])
            else:
                absent.append(position)
        return (yield from self._written(number, absent))

    def _written(self, number: int, absent: Sequence[int]) -> Taking:
        """Take a step whose gradients are in shared memory, but for those at ``absent``."""
        step = exchanges.SharedStep(number, absent)
        yield self._train(step)
        if step.refusal is not None:
            raise from_refusal(step.refusal)
        assert step.result is not None
        return step.result, self._shared.parameters

    def _chunked(
        self, number: int, headers: Sequence[TensorHeader], chunks: Iterable[list[Chunk]]
    ) -> Taking:
        every = len(headers) == len(self._headers)
        begin = pb.StepBegin(step=number, gradients=() if every else headers, every_parameter=every)
        room, reference = self._spare(), self._reference
        step = exchanges.Step(begin, chunks, self._headers, room, reference=reference)
        return (yield from self._converse(number, step))

    def _converse(self, number: int, step: exchanges.PackedStep | exchanges.Step) -> Taking:
        yield self._train(step)
        if step.refusal is not None:
            raise from_refusal(step.refusal)
        assert step.result is not None
        assert step.parameters is not None
        self._rooms.reverse()  # What has come stays; the other one is spare now.
        self._gradients.answered(number)
        self._reference = step.parameters
        return step.result, step.parameters

    def _train(self, step: exchanges.TrainExchange) -> Train:
        timeout_s = self._terms.config.step_timeout_s
        return Train(opening=self._opening(), exchange=step, timeout_s=timeout_s)

    def _opening(self) -> exchanges.Opening:
        asks = self._terms.config.lane != "grpc"
        return exchanges.Opening(self._session_id, self._worker, shared_memory=asks)

    def _spare(self) -> Room:
        """Return memory for parameters that does not hold the newest ones.

        Used again every other step: to take it anew each time costs more than to fill it.
        """
        if len(self._rooms) < 2:
            self._rooms.insert(0, Room(self._headers))
        return self._rooms[0]


def check_unary_fits(headers: Iterable[TensorHeader]) -> None:
    """Check that all parameters fit into the answer of a unary step.

    Raises:
        LimitError: They do not.
    """
    total, allowed = total_bytes(headers), MESSAGE_BYTES_MAX - MESSAGE_HEADROOM_BYTES
    if total > allowed:
        raise LimitError.local(
            f"a unary step carries all parameters in one message; they have {total} bytes,"
            f" and {allowed} fit: take steps via the stream",
            expected=f"at most {allowed} bytes",
            actual=f"{total} bytes",
        )


def total_bytes(headers: Iterable[TensorHeader]) -> int:
    """Return how many bytes the tensors have together."""
    return sum(byte_count(header) for header in headers)
