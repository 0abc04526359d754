"""Shared memory and a journal: what is kept is what was applied, whatever a client writes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from event_loop import TIMEOUT_S
from server_process import running_server

import optserve_client as optserve
from optserve_client.tensors import Array

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memfd_create is of Linux"
)

SIZE = 2_000_003
STEPS = 12
SHM = optserve.ClientConfig(lane="shm")
JOURNAL = optserve.Durability(mode="JOURNAL", snapshot_steps=10 * STEPS)


@contextmanager
def scribbled(buffer: Array, *, non_finite: bool = False) -> Iterator[None]:
    """Write to a gradient, all over it and again and again, while the block runs."""
    done = threading.Event()
    noise = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    if non_finite:
        noise[SIZE // 2] = np.nan

    def scribble() -> None:
        sign = np.float32(1)
        while not done.is_set():
            sign = -sign
            np.multiply(noise, sign, out=buffer)
            buffer[SIZE // 2] = sign

    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_journal_has_what_was_applied_of_gradients_that_change_meanwhile(
    workers: int, tmp_path: Path
) -> None:
    flags = ("--data-dir", str(tmp_path))
    with (
        running_server(*flags) as server,
        optserve.connect(server.address, config=SHM) as client,
        ThreadPoolExecutor() as threads,
    ):
        first = client.create_session(
            {"w": np.zeros(SIZE, np.float32)},
            optimizer=optserve.optim.SGD(lr=1.0),
            durability=JOURNAL,
            workers=workers,
        )
        sessions = [first]
        if workers == 2:
            sessions.append(client.join_session(first.session_id, worker=1))
        buffers = [session.gradient_buffers() for session in sessions]
        with scribbled(buffers[0]["w"]):
            for _ in range(STEPS):
                taken = [
                    threads.submit(session.step, buffer)
                    for session, buffer in zip(sessions, buffers, strict=True)
                ]
                assert {each.result(TIMEOUT_S).step for each in taken} == {first.steps}
        acknowledged = np.array(first.parameters["w"])
        server.process.kill()
        server.process.wait()
    with running_server(*flags) as server, optserve.connect(server.address) as client:
        restored = client.join_session(first.session_id)
        assert restored.steps == STEPS
        assert restored.parameters["w"].tobytes() == acknowledged.tobytes()


def test_no_nan_that_a_client_writes_during_a_step_gets_into_a_session_with_a_journal(
    tmp_path: Path,
) -> None:
    with (
        running_server("--data-dir", str(tmp_path)) as server,
        optserve.connect(server.address, config=SHM) as client,
        client.create_session(
            {"w": np.zeros(SIZE, np.float32)},
            optimizer=optserve.optim.SGD(lr=1.0),
            durability=JOURNAL,
        ) as session,
    ):
        buffers = session.gradient_buffers()
        refused = 0
        with scribbled(buffers["w"], non_finite=True):
            for _ in range(STEPS):
                try:
                    session.step(buffers)
                except optserve.NonFiniteGradientError:
                    refused += 1
                assert np.isfinite(session.parameters["w"]).all()
        assert 0 < refused < STEPS
