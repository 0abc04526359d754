"""The driver of the blocking face: performs operations with grpc's synchronous calls."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Protocol, TypeAlias, TypeVar, cast

import grpc
from google.protobuf.message import Message

from optserve.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from optserve_client._channel import CLOSE_TIMEOUT_S
from optserve_client._effects import Collect, Effect, Event, Operation, Train
from optserve_client._exchange import TrainAnswer, TrainEvent, TrainExchange
from optserve_client._feed import FeedClosedError
from optserve_client._refusals import CallSite, deadline_error, from_grpc
from optserve_client._watchdog import Watchdog
from optserve_client.errors import ClosedError, ProtocolError

_Result = TypeVar("_Result")
_ResponseT_co = TypeVar("_ResponseT_co", covariant=True)
_Outbox: TypeAlias = queue.SimpleQueue[Iterator[TrainEvent] | None]


class BlockingDriver:
    """Performs operations, and owns the one long-lived stream of a worker."""

    def __init__(self, stub: OptimizerServiceStub, target: str, watchdog: Watchdog) -> None:
        self._stub = stub
        self._target = target
        self._watchdog = watchdog
        self._stream: _TrainStream | None = None
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether it performs nothing any more."""
        return self._closed

    def run(self, operation: Operation[_Result]) -> _Result:
        """Perform an operation to its end, and return its result.

        Raises:
            OptserveError: It did not succeed.
        """
        if self._closed:
            raise ClosedError("this client or session has been closed")
        try:
            effect = next(operation)
            while True:
                try:
                    answer = self._perform(effect)
                # Of any kind: an operation cleans up after interrupts, too.
                except BaseException as error:  # noqa: BLE001
                    effect = operation.throw(error)
                else:
                    effect = operation.send(answer)
        except StopIteration as stop:
            result: _Result = stop.value
            return result

    def end_stream(self) -> None:
        """Half-close the worker's stream, and wait a little for the server to end it."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with self._watchdog.limit(CLOSE_TIMEOUT_S, stream.close):
                stream.end()

    def close(self) -> None:
        """End the stream, and perform nothing any more. May be called again."""
        self._closed = True
        self.end_stream()

    def _perform(self, effect: Effect) -> Message | None:
        if isinstance(effect, Train):
            self._train(effect)
            return None
        site = CallSite(rpc=effect.rpc, target=self._target, timeout_s=effect.timeout_s)
        rpc = getattr(self._stub, effect.rpc)
        try:
            if isinstance(effect, Collect):
                _collect(rpc, effect)
                return None
            if isinstance(effect.request, Message):
                answer: Message = rpc(effect.request, timeout=effect.timeout_s)
                return answer
            return _ask_stream(rpc, effect.request, effect.timeout_s)
        except grpc.RpcError as error:
            raise from_grpc(error, site) from error

    def _train(self, effect: Train) -> None:
        try:
            if self._stream is None or not self._stream.is_active():
                self._stream = _TrainStream(self._stub, self._target, self._watchdog)
                self._stream.converse(effect.opening, effect.timeout_s)
            if effect.exchange is not None:
                self._stream.converse(effect.exchange, effect.timeout_s)
        except BaseException:
            # Nobody knows what is still under way on it; the next step opens another one.
            stream, self._stream = self._stream, None
            if stream is not None:
                stream.close()
            raise


class _AnswerStream(Protocol[_ResponseT_co]):
    """The call object of grpc, as far as its stubs do not name it."""

    def __iter__(self) -> Iterator[_ResponseT_co]: ...
    def is_active(self) -> bool: ...
    def cancel(self) -> object: ...


class _TrainStream:
    """The stream of one worker's steps.

    grpc takes the requests in a thread of its own, one at a time as the network has room, while the
    caller's thread takes the responses: both directions flow at once.
    """

    def __init__(self, stub: OptimizerServiceStub, target: str, watchdog: Watchdog) -> None:
        self._target = target
        self._watchdog = watchdog
        self._outbox: _Outbox = queue.SimpleQueue()
        # As the channel has it: see stub_of.
        train = cast("grpc.StreamStreamMultiCallable[TrainEvent, TrainAnswer]", stub.Train)
        self._call: _AnswerStream[TrainAnswer] = train(_drain(self._outbox))
        self._conversing = False
        # Also when nobody closes it, at the latest when the interpreter ends: else grpc's thread
        # would wait for ever.
        self.close = weakref.finalize(self, _abandon, self._call, self._outbox)

    def is_active(self) -> bool:
        """Whether neither side has ended the stream, as far as is known here."""
        return self._call.is_active()

    def converse(self, exchange: TrainExchange, timeout_s: float) -> None:
        """Send what the exchange says, and hand it what comes, until it is over."""
        site = CallSite(rpc="Train", target=self._target, timeout_s=timeout_s)
        self._conversing = True
        with self._watchdog.limit(timeout_s, self._call.cancel) as deadline:
            self._outbox.put(exchange.requests())
            try:
                for response in self._call:
                    if exchange.receive(response):
                        self._conversing = False
                        return
            except grpc.RpcError as error:
                if deadline.expired:
                    raise deadline_error(site) from error
                raise from_grpc(error, site) from error
        raise ProtocolError("the server ended the stream in the middle of a conversation")

    def end(self) -> None:
        """Half-close, and wait for the end; cancel what another thread does on the stream."""
        if not self._conversing:
            self._outbox.put(None)
            with suppress(grpc.RpcError):
                for _ in self._call:
                    pass
        self.close()


def _drain(outbox: _Outbox) -> Iterator[TrainEvent]:
    """Yield what is to be sent. The end half-closes the stream: so a step is given up."""
    with suppress(FeedClosedError):
        while (requests := outbox.get()) is not None:
            yield from requests


def _abandon(call: _AnswerStream[TrainAnswer], outbox: _Outbox) -> None:
    call.cancel()
    outbox.put(None)


def _ask_stream(
    rpc: grpc.StreamUnaryMultiCallable[Event, Message],
    requests: Iterator[Event],
    timeout_s: float,
) -> Message:
    call = rpc.future(requests, timeout=timeout_s)  # A plain call could not be cancelled.
    try:
        return call.result()
    except BaseException:
        call.cancel()
        raise


def _collect(rpc: Callable[..., _AnswerStream[Event]], effect: Collect) -> None:
    call = rpc(effect.request, timeout=effect.timeout_s)
    try:
        for response in call:
            effect.receive(response)
    except BaseException:
        call.cancel()
        raise
