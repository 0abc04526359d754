"""The driver of the asyncio face: performs operations with grpc.aio."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar, cast

import grpc
from google.protobuf.message import Message

from optserve_client._channel import CLOSE_TIMEOUT_S, Line
from optserve_client._effects import Ask, Collect, Converse, Effect, Open, Operation, Pause
from optserve_client._ending import Ending
from optserve_client._exchange import Opening, TrainAnswer, TrainEvent, TrainExchange
from optserve_client._refusals import CallSite, deadline_error, from_grpc
from optserve_client.errors import ClosedError, ProtocolError

if TYPE_CHECKING:  # A name of the stubs only.
    from optserve.v1.optimizer_service_pb2_grpc import OptimizerServiceAsyncStub

_Result = TypeVar("_Result")


class AsyncDriver:
    """Performs operations, and owns the one long-lived stream of a worker."""

    def __init__(self, line: Line[OptimizerServiceAsyncStub]) -> None:
        self._line = line
        self._stream: _TrainStream | None = None
        self._stopped = asyncio.Event()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether it performs nothing any more."""
        return self._closed

    async def run(self, operation: Operation[_Result]) -> _Result:
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
                    answer = await self._perform(effect, stopped)
                # Of any kind: an operation cleans up after cancellation, too.
                except BaseException as error:  # noqa: BLE001
                    effect = operation.throw(error)
                else:
                    effect = operation.send(answer)
        except StopIteration as stop:
            result: _Result = stop.value
            return result

    async def end_stream(self) -> None:
        """Half-close the worker's stream, and wait a little for the server to end it.

        What another task waits to try again comes to its end as well.
        """
        stream, self._stream = self._stream, None
        stopped, self._stopped = self._stopped, asyncio.Event()
        stopped.set()
        if stream is not None:
            await stream.end()

    async def close(self) -> None:
        """End the stream, and perform nothing any more. May be called again."""
        self._closed = True
        await self.end_stream()

    async def _perform(self, effect: Effect, stopped: asyncio.Event) -> Message | None:
        try:
            match effect:
                case Converse():
                    await self._converse(effect.exchange, effect.timeout_s)
                case Open():
                    await self._open(effect.opening, effect.timeout_s)
                case Pause():
                    await _pause(effect.seconds, stopped)
                case _:
                    return await self._call(effect)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                # Not the task was cancelled, but the call under it, when another task closed us.
                raise ClosedError("this client or session was closed during the call") from error
            raise
        return None

    async def _call(self, effect: Ask | Collect) -> Message | None:
        line = self._line
        rpc = getattr(line.stub, effect.rpc)
        call = rpc(effect.request, timeout=effect.timeout_s, metadata=line.metadata())
        ending = Ending(call)
        try:
            if isinstance(effect, Collect):
                async for response in call:
                    effect.receive(response)
                return None
            answer: Message = await call
        except grpc.RpcError as error:
            site = CallSite(rpc=effect.rpc, target=line.target, timeout_s=effect.timeout_s)
            raise from_grpc(await ending.reason(error), site) from error
        except BaseException:
            call.cancel()
            raise
        return answer

    async def _open(self, opening: Opening, timeout_s: float) -> None:
        if self._stream is None or not self._stream.is_active():
            self._stream = _TrainStream(self._line)
            await self._converse(opening, timeout_s)

    async def _converse(self, exchange: TrainExchange, timeout_s: float) -> None:
        stream = self._stream
        if stream is None:
            raise ClosedError("this client or session was closed during the call")
        try:
            await stream.converse(exchange, timeout_s)
        except BaseException:
            # Nobody knows what is still under way on it; the next step opens another one.
            self._stream = None
            stream.close()
            raise


class _TrainStream:
    """The stream of one worker's steps."""

    def __init__(self, line: Line[OptimizerServiceAsyncStub]) -> None:
        self._target = line.target
        # As the channel has it: see stub_of.
        train = cast("grpc.aio.StreamStreamMultiCallable[TrainEvent, TrainAnswer]", line.stub.Train)
        self._call = train(metadata=line.metadata())
        self._ending = Ending(self._call)
        self._conversing = False

    def is_active(self) -> bool:
        """Whether neither side has ended the stream, as far as is known here."""
        return not self._call.done()

    async def converse(self, exchange: TrainExchange, timeout_s: float) -> None:
        """Send what the exchange says, and hand it what comes, until it is over."""
        site = CallSite(rpc="Train", target=self._target, timeout_s=timeout_s)
        self._conversing = True
        requests = exchange.requests()
        sending: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(timeout_s):
                await self._write(next(requests))
                if (second := next(requests, None)) is not None:
                    # In a task of its own, so that both directions flow at once.
                    sending = asyncio.create_task(self._send(second, requests))
                while (response := await self._call.read()) is not grpc.aio.EOF:
                    if exchange.receive(cast("TrainAnswer", response)):
                        if sending is not None:
                            await sending
                        self._conversing = False
                        return
        except TimeoutError as error:
            raise deadline_error(site) from error
        except grpc.RpcError as error:
            raise from_grpc(await self._ending.reason(error), site) from error
        finally:
            if sending is not None:
                sending.cancel()
        raise ProtocolError("the server ended the stream in the middle of a conversation")

    async def end(self) -> None:
        """Half-close, and wait for the end; cancel what another task does on the stream."""
        try:
            if not self._conversing:
                with suppress(grpc.RpcError, TimeoutError, asyncio.InvalidStateError):
                    async with asyncio.timeout(CLOSE_TIMEOUT_S):
                        await self._call.done_writing()
                        await self._call.code()
        finally:
            self.close()

    def close(self) -> None:
        """Cancel the stream, if it has not ended."""
        self._call.cancel()

    async def _send(self, request: TrainEvent, others: Iterator[TrainEvent]) -> None:
        await self._write(request)
        for other in others:
            await self._write(other)

    async def _write(self, request: TrainEvent) -> None:
        # If the stream has ended, reading says why.
        with suppress(grpc.RpcError, asyncio.InvalidStateError):
            await self._call.write(request)


async def _pause(seconds: float, stopped: asyncio.Event) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stopped.wait()
        raise ClosedError("this client or session was closed during the call")
