"""Ours: a real server process, through the public Python client's blocking face.

Options: ``lane`` (grpc, shm), ``overlap`` (auto, on, off), ``gradients`` and ``parameters`` (data
types on the wire), ``device`` (cpu, cuda), ``durability`` (none, snapshot, journal, fsync).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from benchmarks import knobs
from benchmarks.job import TESTS, BlockingPeer, Job
from benchmarks.model import Tensors
from benchmarks.training import session_optimizer
from server_process import ServerProcess, running_server

import optserve_client as optserve
from optserve_client import Lane


@contextmanager
def connect(job: Job) -> Iterator[OurPeer]:
    """Start a server, and create a session."""
    lane: Lane = "shm" if job.options.get("lane") == "shm" else "grpc"
    config = knobs.client_config(lane)
    wire = knobs.wire(job.options)
    with (
        data_directory() as folder,
        our_server(job, "--data-dir", folder) as server,
        optserve.connect(server.address, config=config, progress=False) as client,
        client.create_session(
            job.model().initial(),
            optimizer=session_optimizer(job.optimizer),
            wire=wire,
            durability=knobs.durability(job.options),
        ) as session,
    ):
        yield OurPeer(job, session, lane)


@contextmanager
def data_directory() -> Iterator[str]:
    """Make a data directory on a disk: what is meant for temporary files may be memory."""
    build = TESTS.parent / "build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=build) as folder:
        yield folder


@contextmanager
def our_server(job: Job, *flags: str) -> Iterator[ServerProcess]:
    """Start the server as the job has it."""
    with running_server(
        *("--host", job.host, "--allow-plaintext", "true", "--torch-threads", str(job.threads)),
        *("--device", job.options.get("device", "cpu")),
        *knobs.server_flags(job.options.get("overlap", "auto")),
        *flags,
        prefix=job.server_prefix,
    ) as server:
        yield server


class OurPeer(BlockingPeer):
    """One session."""

    def __init__(self, job: Job, session: optserve.Session, lane: Lane) -> None:
        super().__init__(job)
        self._session = session
        self._gradients: Tensors = {}
        # In the shared region, where backward would write: then a step copies nothing.
        self._buffers = knobs.gradient_buffers(session) if lane == "shm" else None

    def prepare(self, gradients: Tensors) -> None:
        self._gradients = gradients
        if self._buffers is not None:
            for name, gradient in gradients.items():
                np.copyto(self._buffers[name], gradient)
            self._gradients = self._buffers

    def step(self) -> None:
        self._session.step(self._gradients)
        self.values = self._session.parameters
