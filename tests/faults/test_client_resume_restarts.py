"""Servers that die in the middle of a step in shared memory, and come back with what they promised.

What they do to steps that travel: see test_kill.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from ports import kept_port
from server_process import STOP_TIMEOUT_S, ServerProcess, running_server

import optserve_client as optserve
from optserve_client import ClientConfig, Durability, Retry

ONES = np.ones(1_000, np.float32)
CONFIG = ClientConfig(lane="shm", retry=Retry(backoff_s=0.05, backoff_max_s=0.2))
DIES_AT = 3  # Its third step.


@contextmanager
def mortal_server(folder: Path, place: str) -> Iterator[ServerProcess]:
    """Yield a server that kills itself at a place, and then another one at its address."""
    flags = ("--data-dir", str(folder))
    environment = {"OPTSERVE_FAILPOINTS": f"{place}=kill@{DIES_AT}"}
    with kept_port() as port, ExitStack() as stack:
        first = stack.enter_context(running_server(*flags, environment=environment, port=port))

        def follow() -> None:
            first.process.wait(STOP_TIMEOUT_S)
            stack.enter_context(running_server(*flags, port=port))

        heir = threading.Thread(target=follow)
        heir.start()
        try:
            yield first
        finally:
            first.process.kill()
            heir.join()


@contextmanager
def journalled_session(server: ServerProcess) -> Iterator[optserve.Session]:
    with (
        optserve.connect(server.address, config=CONFIG, progress=False) as client,
        client.create_session(
            {"w": ONES},
            optimizer=optserve.optim.SGD(lr=1),
            durability=Durability(mode="JOURNAL"),
        ) as session,
    ):
        yield session


def test_gradients_of_the_callers_own_are_sent_again(tmp_path: Path) -> None:
    with (
        mortal_server(tmp_path, "change-unrecorded") as server,
        journalled_session(server) as session,
    ):
        for step in range(1, 6):
            assert session.step({"w": step * ONES}).step == step
        assert session.parameters["w"].tolist() == [1.0 - 15] * 1_000


def test_gradients_in_shared_memory_that_the_server_has_recorded_count(tmp_path: Path) -> None:
    with mortal_server(tmp_path, "change-made") as server, journalled_session(server) as session:
        for step in range(1, 6):
            buffers = session.gradient_buffers()
            buffers["w"][:] = step
            result = session.step(buffers)
            assert (result.step, result.replayed) == (step, step == DIES_AT)
        assert session.parameters["w"].tolist() == [1.0 - 15] * 1_000


def test_gradients_in_shared_memory_that_died_with_the_server_have_to_be_computed_again(
    tmp_path: Path,
) -> None:
    lost = []
    with (
        mortal_server(tmp_path, "change-unrecorded") as server,
        journalled_session(server) as session,
    ):
        while session.steps < 5:
            buffers = session.gradient_buffers()
            buffers["w"][:] = session.steps + 1
            try:
                session.step(buffers)
            except optserve.StepsLostError as error:
                lost.append((error.resumes_from, error.lost))
                assert session.resume().steps == DIES_AT - 1
        assert lost == [(DIES_AT, 0)]
        assert session.parameters["w"].tolist() == [1.0 - 15] * 1_000
