"""The floor of gRPC in Python: the same bytes through a bare grpc.aio call, and nothing else.

The option ``call`` is "stream", a message each way on one long stream, or "unary".
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
        self._gradients = [_joined(each) for each in model.gradient_sets()]
        self._call = job.options["call"]
        self._runner = runner
        self._answer = b""

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
        flat = np.frombuffer(self._answer, dtype=np.float32)
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
                await self._stream.write(gradients)
                answer = await self._stream.read()
                assert isinstance(answer, bytes)  # And not the end of the stream.
                self._answer = answer
            else:
                self._answer = await self._unary(gradients)
            times.append(time.perf_counter() - start)
        return times


async def _serve(job: Job, announce: Callable[[str], None]) -> None:
    answer = _joined(job.model().initial())

    async def unary(_request: bytes, _context: object) -> bytes:
        return answer

    async def stream(requests: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        async for _ in requests:
            yield answer

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


def _joined(tensors: Tensors) -> bytes:
    return b"".join(tensor.tobytes() for tensor in tensors.values())
