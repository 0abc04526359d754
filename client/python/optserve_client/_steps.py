"""The ways in which a worker's steps travel: in chunks, packed, in shared memory, in one call."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from xxhash import xxh3_128

from optserve.limits import MESSAGE_BYTES_MAX, MESSAGE_HEADROOM_BYTES
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.session_pb2 import Session
from optserve.v1.tensor_pb2 import Tensor, TensorHeader
from optserve.wire import Chunk, byte_count, split, whole
from optserve_client import _exchange as exchanges
from optserve_client._digest import DIGEST_BYTES, StepDigest
from optserve_client._effects import Converse, Open, Operation, ask
from optserve_client._encoded import GradientSources
from optserve_client._feed import Feed
from optserve_client._incoming import Room, arrays_of
from optserve_client._pending import PendingStep
from optserve_client._refusals import from_refusal
from optserve_client._shared_lane import SharedLane
from optserve_client._terms import Terms
from optserve_client.errors import (
    LimitError,
    OptserveError,
    ProtocolError,
    SharedMemoryError,
    StalledError,
    StepsLostError,
)
from optserve_client.tensors import Array, bytes_of, encode_as, form_of

_CLIENT_ID_BYTES = 16

Taking: TypeAlias = Operation[tuple[pb.StepResult, list[Array]]]
"""Takes a step: returns what it did, and the parameters after it, in the session's order."""


class StepWays:
    """The ways in which one worker takes its steps, and what a step leaves behind for the next."""

    def __init__(self, session: Session, *, terms: Terms, worker: int) -> None:
        """Take steps in ``session`` as ``worker``."""
        self.steps = session.status.steps
        """How many steps are known here to have been applied."""
        self._session_id = session.status.session_id
        self._worker = worker
        self._terms = terms
        # Of this object, and not of the client: two that take the same seat are a mistake.
        self._client_id = secrets.token_bytes(_CLIENT_ID_BYTES)
        self._headers = list(session.spec.parameters)
        self._names = [header.name for header in self._headers]
        self._forms = {header.name: form_of(header) for header in self._headers}
        # Of what steps bring: one holds the newest values, and the other waits for the next ones.
        self._rooms: list[Room] = []
        self._shared = SharedLane(self._headers)
        self._encoding = session.spec.wire.gradients
        self._gradients = GradientSources(self._encoding)
        # What the answer to the last streamed step has brought: the next one may build on it.
        self._reference: list[Array] | None = None
        self._seed = secrets.token_bytes(DIGEST_BYTES)
        self.packs = total_bytes(self._headers) <= terms.chunk_bytes
        """Whether a step with every gradient is one message each way, if it has to travel."""

    @property
    def buffers(self) -> list[Array]:
        """Arrays that gradients are best written to, once the worker's stream has been opened."""
        return self._shared.buffers

    def forget(self) -> None:
        """Forget what steps have left behind: the next one does not follow the last one."""
        self._gradients = GradientSources(self._encoding)
        self._seed = secrets.token_bytes(DIGEST_BYTES)

    def bytes_of(self, header: TensorHeader, gradient: ArrayLike, at: int) -> memoryview:
        """Return the bytes of a gradient, the one at position ``at`` of a step.

        Raises:
            RequestError: It does not fit the parameter that ``header`` describes.
        """
        shared = self._shared.bytes_of(header.name, gradient)
        if shared is not None:
            return shared
        values = np.asarray(gradient)
        if (values.dtype, values.shape) == self._forms[header.name]:
            return bytes_of(values)
        return encode_as(header, values, role="gradient", path=f"gradients[{at}]")

    def enter(self) -> Operation[pb.TrainOpened | None]:
        """Open the worker's stream, and enter the lane; None if the stream is open already.

        Raises:
            SharedMemoryError: There is no shared memory, and it must be.
        """
        config = self._terms.config
        opening = exchanges.Opening(
            self._session_id,
            self._worker,
            client_id=self._client_id,
            shared_memory=config.lane != "grpc",
        )
        yield Open(opening=opening, timeout_s=config.timeout_s)
        opened = opening.opened
        if opened is not None:
            self._reference = None
            self._shared.take(opened)
        if config.lane == "shm" and self._shared.closed_because:
            raise SharedMemoryError(f"no shared memory: {self._shared.closed_because}")
        return opened

    def open(self) -> Operation[pb.TrainOpened | None]:
        """Open the worker's stream as ``enter`` does, to go on from the last step known here.

        Raises:
            SharedMemoryError: As of ``enter``.
            StepsLostError: The server has fewer steps than it has answered.
        """
        opened = yield from self.enter()
        if opened is not None and opened.status.steps < self.steps:
            raise steps_lost(self.steps, opened.status.steps)
        return opened

    def streamed(self, step: PendingStep) -> Taking:
        """Take a step on the worker's stream; only what the server does not have is sent."""
        yield from self._opened_for(step)
        if step.has_arrived:
            # In chunks also where memory is shared: there, nothing would tell the question from
            # the gradients, and what lies in their place may have been used up.
            try:
                return (yield from self._chunked(step, (), None))
            except ProtocolError as error:
                if not is_given_up(error):
                    raise
            _check_kept(step)
        if not self._shared.closed_because:
            return (yield from self._shared_step(step))
        digest = StepDigest(self._names)
        names = [header.name for header in step.headers]
        sources = self._gradients.of(step.number, digest, names, step.tensors)
        if len(names) == len(self._names) and self.packs:
            packed = exchanges.PackedStep(
                step.number, sources, self._headers, digest, self._reference
            )
            return (yield from self._brought(step, packed))
        chunks = split(sources, self._terms.chunk_bytes)
        return (yield from self._chunked(step, chunks, digest))

    def fed(self, step: PendingStep, feed: Feed) -> Taking:
        """Take a step on the worker's stream, with gradients as they become ready."""
        yield from self._opened_for(step)
        if self._shared.closed_because:
            digest = StepDigest(self._names)
            source_of = self._gradients.begin(step.number, digest)
            chunks = feed.chunks(source_of, self._terms.chunk_bytes)
            return (yield from self._chunked(step, chunks, digest))
        absent = {name: position for position, name in enumerate(self._names)}
        present = [absent.pop(name) for name in feed.names]
        for position, gradient in feed.gradients():
            self._shared.write(present[position], gradient)
        feed.wait_for_end()
        return (yield from self._written(step, list(absent.values())))

    def awaited(self, step: PendingStep) -> Taking:
        """Wait for the answer to a step that the server has."""
        opened = yield from self._reach(step)
        if opened is not None:
            step.look_for(opened.contribution)
            if not step.has_arrived:
                raise steps_lost(self.steps, opened.status.steps)
        return (yield from self._chunked(step, (), None))

    def unary(self, step: PendingStep) -> Taking:
        """Take a step in one message each way."""
        check_unary_fits(self._headers)
        if step.has_arrived:
            # Asked for without its bytes. Without its names it would be a step in which no
            # parameter has a gradient, if its round was given up since.
            gradients = [Tensor(header=header) for header in step.headers]
        else:
            digest = StepDigest(self._names)
            names = [header.name for header in step.headers]
            sources = self._gradients.of(step.number, digest, names, step.tensors)
            gradients = [
                Tensor(header=header, data=whole(source))
                for header, source in zip(step.headers, sources, strict=True)
            ]
            step.digest = self._drawn(step.number) or digest.value()
        request = pb.StepRequest(
            session_id=self._session_id,
            worker=self._worker,
            step=step.number,
            gradients=gradients,
            digest=step.digest,
        )
        try:
            response = yield from ask(
                "Step", request, pb.StepResponse, self._terms.config.step_timeout_s
            )
        except OptserveError as error:
            step.is_unknown |= is_silence(error)
            raise
        exchanges.check_announced([tensor.header for tensor in response.parameters], self._headers)
        data = [tensor.data for tensor in response.parameters]
        arrays = arrays_of(self._headers, data, response.encoding)
        self._gradients.answered(step.number)
        return response.result, arrays

    def _opened_for(self, step: PendingStep) -> Operation[None]:
        """See to it that the stream is open, and learn whether the server has the step."""
        step.digest = step.digest or self._drawn(step.number)
        opened = yield from self._reach(step)
        if opened is not None:
            step.look_for(opened.contribution)
        # Who has mapped memory keeps it, but a server that has gone may have calculated in it.
        if step.exposed_to != self._shared.token and not step.has_arrived:
            _check_kept(step)

    def _reach(self, step: PendingStep) -> Operation[pb.TrainOpened | None]:
        """Open the stream for a step, and note when it is open."""
        step.reached_s = None
        opened = yield from self.open()
        step.reached_s = time.monotonic()
        return opened

    def _shared_step(self, step: PendingStep) -> Taking:
        present = {
            header.name: tensor for header, tensor in zip(step.headers, step.tensors, strict=True)
        }
        absent = []
        for position, name in enumerate(self._names):
            if name not in present:
                absent.append(position)
            elif not self._shared.write(position, present[name]):
                step.exposed_to = self._shared.token
        return (yield from self._written(step, absent))

    def _written(self, step: PendingStep, absent: Sequence[int]) -> Taking:
        """Take a step whose gradients are in shared memory, but for those at ``absent``."""
        shared = exchanges.SharedStep(step.number, absent, self._drawn(step.number))
        yield from self._converse(step, shared)
        assert shared.result is not None
        return shared.result, self._shared.parameters

    def _drawn(self, number: int) -> bytes:
        """Return what a step in shared memory is known by, whatever its gradients; else nothing.

        To hash them would take a tenth of the step. It is the same one when the step is taken
        again, and no other client's.
        """
        if self._shared.closed_because:
            return b""
        return xxh3_128(self._seed + number.to_bytes(8)).digest()

    def _chunked(
        self, step: PendingStep, chunks: Iterable[list[Chunk]], digest: StepDigest | None
    ) -> Taking:
        """Take a step in chunks; without a digest to calculate, the server knows it by its own."""
        every = len(step.headers) == len(self._headers)
        begin = pb.StepBegin(
            step=step.number,
            gradients=() if every else step.headers,
            every_parameter=every,
            digest=b"" if digest else step.digest,
        )
        room, reference = self._spare(), self._reference
        chunked = exchanges.Step(
            begin, chunks, self._headers, room, digest=digest, reference=reference
        )
        return (yield from self._brought(step, chunked))

    def _brought(
        self, step: PendingStep, exchange: exchanges.PackedStep | exchanges.Step
    ) -> Taking:
        """Hold an exchange that brings the parameters."""
        yield from self._converse(step, exchange)
        assert exchange.result is not None
        assert exchange.parameters is not None
        self._rooms.reverse()  # What has come stays; the other one is spare now.
        self._gradients.answered(step.number)
        self._reference = exchange.parameters
        return exchange.result, exchange.parameters

    def _converse(self, step: PendingStep, exchange: exchanges.StepExchange) -> Operation[None]:
        try:
            yield Converse(exchange=exchange, timeout_s=self._terms.config.step_timeout_s)
        except OptserveError as error:
            if exchange.is_sent:
                step.digest = exchange.digest
                step.is_unknown |= is_silence(error)
            raise
        if exchange.refusal is not None:
            step.is_unknown = step.has_arrived = False
            raise from_refusal(exchange.refusal)

    def _spare(self) -> Room:
        """Return memory for parameters that does not hold the newest ones.

        Used again every other step: to take it anew each time costs more than to fill it.
        """
        if len(self._rooms) < 2:
            self._rooms.insert(0, Room(self._headers))
        return self._rooms[0]


def is_silence(error: OptserveError) -> bool:
    """Return whether an error leaves open what became of a step that was sent."""
    return not error.reason or isinstance(error, StalledError)


def is_given_up(error: ProtocolError) -> bool:
    """Return whether the server has not got any more what it was asked for without its bytes."""
    return error.reason == "BYTE_COUNT_MISMATCH"


def steps_lost(known: int, steps: int) -> StepsLostError:
    """Return the error for a session of which ``known`` steps were answered, and that has fewer."""
    return StepsLostError(
        f"the session stands at {steps} steps; {known} had been answered: the server has lost the"
        f" last {known - steps}; resume(), and go on with step {steps + 1}",
        resumes_from=steps + 1,
        lost=known - steps,
    )


def _check_kept(step: PendingStep) -> None:
    """Make sure that a step which was not applied can be sent again, after its server has had it.

    Raises:
        StepsLostError: Its gradients were nowhere but in memory that was shared.
    """
    if step.exposed_to:
        raise StepsLostError(
            f"step {step.number} was not applied, and its gradients cannot be sent again: they were"
            " in memory shared with the server, which may have changed them; resume(), and compute"
            " them again",
            resumes_from=step.number,
            lost=0,
        )


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
