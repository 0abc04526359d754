"""The floor of gRPC in Python: the same bytes through a bare grpc.aio call, and nothing else.

The option ``call`` is "stream", messages of up to 1 MiB on one long stream, first all of them there
and then all of them back, or "unary".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import grpc
import numpy as np
from benchmarks.job import Job, serving
from benchmarks.model import Tensors

_SERVICE = "bench.PingPong"
_MESSAGE_BYTES = 1 << 20

_Unary: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]"
_Stream: TypeAlias = "grpc.aio.StreamStreamMultiCallable[bytes, bytes]"


@contextmanager
def connect(job: Job) -> Iterator[PingPongPeer]:
    """Start a server, and connect to it."""
    with serving(job) as address, asyncio.Runner() as runner:
        peer = PingPongPeer(job, runner)
        runner.run(peer.open(address))
        yield peer
        runner.run(peer.close())


def serve(job: Job, announce: Callable[[str], None]) -> None:
    """Answer every message with the model's initial parameters."""
    asyncio.run(_serve(job, announce))


class PingPongPeer:
    """One channel, and one long stream on it."""

    def __init__(self, job: Job, runner: asyncio.Runner) -> None:
        model = job.model()
        self._shapes = model.shapes
        self._gradients = [_messages(each) for each in model.gradient_sets()]
        self._call = job.options["call"]
        self._runner = runner
        self._answer: list[bytes] = []

    async def open(self, address: str) -> None:
        """Connect, and begin the stream."""
        self._channel = grpc.aio.insecure_channel(address)
        unary: _Unary = self._channel.unary_unary(f"/{_SERVICE}/Unary")
        stream: _Stream = self._channel.stream_stream(f"/{_SERVICE}/Stream")
        self._unary, self._stream = unary, stream()

    async def close(self) -> None:
        """End the stream."""
        self._stream.cancel()
        await self._channel.close()

    def run(self, steps: range) -> list[float]:
        return self._runner.run(self._run(steps))

    def parameters(self) -> Tensors:
        flat = np.frombuffer(b"".join(self._answer), dtype=np.float32)
        sizes = [int(np.prod(shape)) for shape in self._shapes.values()]
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    async def _run(self, steps: range) -> list[float]:
        times = []
        for number in steps:
            gradients = self._gradients[number % len(self._gradients)]
            start = time.perf_counter()
            if self._call == "stream":
                for message in gradients:
                    await self._stream.write(message)
                self._answer = [await self._next() for _ in gradients]
            else:
                (message,) = gradients
                self._answer = [await self._unary(message)]
            times.append(time.perf_counter() - start)
        return times

    async def _next(self) -> bytes:
        message = await self._stream.read()
        assert isinstance(message, bytes)  # And not the end of the stream.
        return message


async def _serve(job: Job, announce: Callable[[str], None]) -> None:
    answer = _messages(job.model().initial())

    async def unary(_request: bytes, _context: object) -> bytes:
        (message,) = answer
        return message

    async def stream(requests: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        received = 0
        async for _ in requests:
            received += 1
            if received % len(answer) == 0:
                for message in answer:
                    yield message

    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(_SERVICE, handlers)])
    port = server.add_insecure_port(f"{job.host}:0")
    await server.start()
    announce(f"{job.host}:{port}")
    await server.wait_for_termination()


def _messages(tensors: Tensors) -> list[bytes]:
    data = b"".join(tensor.tobytes() for tensor in tensors.values())
    return [data[at : at + _MESSAGE_BYTES] for at in range(0, len(data), _MESSAGE_BYTES)]
