"""The driver of the blocking face: performs operations with grpc's synchronous calls."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Protocol, TypeAlias, TypeVar, cast

import grpc
from google.protobuf.message import Message

from optserve.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from optserve_client._channel import CLOSE_TIMEOUT_S, Line
from optserve_client._effects import (
    Ask,
    Collect,
    Converse,
    Effect,
    Event,
    Open,
    Operation,
    Pause,
)
from optserve_client._exchange import Opening, TrainAnswer, TrainEvent, TrainExchange
from optserve_client._feed import FeedClosedError
from optserve_client._refusals import CallSite, deadline_error, from_grpc
from optserve_client._watchdog import Watchdog
from optserve_client.errors import ClosedError, ProtocolError

_Result = TypeVar("_Result")
_ResponseT_co = TypeVar("_ResponseT_co", covariant=True)
_Outbox: TypeAlias = queue.SimpleQueue[Iterator[TrainEvent] | None]


class BlockingDriver:
    """Performs operations, and owns the one long-lived stream of a worker."""

    def __init__(self, line: Line[OptimizerServiceStub], watchdog: Watchdog) -> None:
        self._line = line
        self._watchdog = watchdog
        self._stream: _TrainStream | None = None
        self._stopped = threading.Event()
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
        stopped = self._stopped
        try:
            effect = next(operation)
            while True:
                try:
                    answer = self._perform(effect, stopped)
                # Of any kind: an operation cleans up after interrupts, too.
                except BaseException as error:  # noqa: BLE001
                    effect = operation.throw(error)
                else:
                    effect = operation.send(answer)
        except StopIteration as stop:
            result: _Result = stop.value
            return result

    def end_stream(self) -> None:
        """Half-close the worker's stream, and wait a little for the server to end it.

        What another thread waits to try again comes to its end as well.
        """
        stream, self._stream = self._stream, None
        stopped, self._stopped = self._stopped, threading.Event()
        stopped.set()
        if stream is not None:
            with self._watchdog.limit(CLOSE_TIMEOUT_S, stream.close):
                stream.end()

    def close(self) -> None:
        """End the stream, and perform nothing any more. May be called again."""
        self._closed = True
        self.end_stream()

    def _perform(self, effect: Effect, stopped: threading.Event) -> Message | None:
        match effect:
            case Converse():
                self._converse(effect.exchange, effect.timeout_s)
            case Open():
                self._open(effect.opening, effect.timeout_s)
            case Pause():
                if stopped.wait(effect.seconds):
                    raise ClosedError("this client or session was closed during the call")
            case _:
                return self._call(effect)
        return None

    def _call(self, effect: Ask | Collect) -> Message | None:
        line = self._line
        rpc = getattr(line.stub, effect.rpc)
        options = {"timeout": effect.timeout_s, "metadata": line.metadata()}
        try:
            if isinstance(effect, Collect):
                _collect(rpc(effect.request, **options), effect)
                return None
            if isinstance(effect.request, Message):
                answer: Message = rpc(effect.request, **options)
                return answer
            # A plain call could not be cancelled.
            return _result(rpc.future(effect.request, **options))
        except grpc.RpcError as error:
            site = CallSite(rpc=effect.rpc, target=line.target, timeout_s=effect.timeout_s)
            raise from_grpc(error, site) from error

    def _open(self, opening: Opening, timeout_s: float) -> None:
        if self._stream is None or not self._stream.is_active():
            self._stream = _TrainStream(self._line, self._watchdog)
            self._converse(opening, timeout_s)

    def _converse(self, exchange: TrainExchange, timeout_s: float) -> None:
        stream = self._stream
        if stream is None:
            raise ClosedError("this client or session was closed during the call")
        try:
            stream.converse(exchange, timeout_s)
        except BaseException:
            # Nobody knows what is still under way on it; the next step opens another one.
            self._stream = None
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

    def __init__(self, line: Line[OptimizerServiceStub], watchdog: Watchdog) -> None:
        self._target = line.target
        self._watchdog = watchdog
        self._outbox: _Outbox = queue.SimpleQueue()
        # As the channel has it: see stub_of.
        train = cast("grpc.StreamStreamMultiCallable[TrainEvent, TrainAnswer]", line.stub.Train)
        self._call: _AnswerStream[TrainAnswer] = train(
            _drain(self._outbox), metadata=line.metadata()
        )
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


def _result(call: grpc.Future[Message]) -> Message:
    try:
        return call.result()
    except BaseException:
        call.cancel()
        raise


def _collect(call: _AnswerStream[Event], effect: Collect) -> None:
    try:
        for response in call:
            effect.receive(response)
    except BaseException:
        call.cancel()
        raise
