"""Ours, through the client's asyncio face, over gRPC. The options are those of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks import knobs
from benchmarks.job import Job
from benchmarks.model import Tensors
from benchmarks.peers.ours import our_server
from benchmarks.training import session_optimizer

from optserve_client import aio


@contextmanager
def connect(job: Job) -> Iterator[AsyncioPeer]:
    """Start a server, and create a session."""
    with our_server(job) as server, asyncio.Runner() as runner:
        peer = AsyncioPeer(job, runner)
        runner.run(peer.open(server.address))
        yield peer
        runner.run(peer.close())


class AsyncioPeer:
    """One session."""

    def __init__(self, job: Job, runner: asyncio.Runner) -> None:
        self._job = job
        self._runner = runner
        self._gradient_sets = job.model().gradient_sets()

    async def open(self, address: str) -> None:
        """Connect, and create the session."""
        config = knobs.client_config("grpc")
        self._client = await aio.connect(address, config=config, progress=False)
        self._session = await self._client.create_session(
            self._job.model().initial(),
            optimizer=session_optimizer(self._job.optimizer),
        )

    async def close(self) -> None:
        """Delete the session, and disconnect."""
        await self._session.delete()
        await self._client.close()

    def run(self, steps: range) -> list[float]:
        return self._runner.run(self._run(steps))

    def parameters(self) -> Tensors:
        return self._session.parameters

    async def _run(self, steps: range) -> list[float]:
        times = []
        for number in steps:
            gradients = self._gradient_sets[number % len(self._gradient_sets)]
            start = time.perf_counter()
            await self._session.step(gradients)
            times.append(time.perf_counter() - start)
        return times
