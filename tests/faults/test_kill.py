"""A server that is killed with -9 under load, and started again: nothing acknowledged is lost.

The clients are real, and know nothing of it but that their calls take longer.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from drivers_grpc import StubDriver
from faults.durable import FSYNC, JOURNAL, durable_spec, snapshots
from messages import bytes_of
from ports import kept_port
from scenarios.models import gradients, model
from server_process import ServerProcess, running_server

from optserve.v1.session_pb2 import Durability
from optserve_client import ClientConfig, Retry, StepsLostError, connect
from optserve_server.core.device import Device
from optserve_server.core.limits import Limits
from optserve_server.core.session import Session
from optserve_server.rpc import decode_spec

KILLS = 3
SESSIONS = 3
PATIENCE_S = 120.0
CONFIG = ClientConfig(lane="grpc", retry=Retry(backoff_s=0.02, backoff_max_s=0.2))

pytestmark = pytest.mark.timeout(600)  # A dozen servers start here, on a machine that is busy.

FAILPOINTS = (
    "change-unrecorded",
    "change-recorded",
    "change-made",
    "snapshot-half-written",
    "snapshot-written",
    "snapshot-renamed",
)


class Lives:
    """One server after the other, at one address and on one data directory."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._port = port
        self._stack = ExitStack()
        self.server: ServerProcess

    @property
    def address(self) -> str:
        """Where they serve."""
        return self.server.address

    def begin(self, failpoints: str = "") -> None:
        """Start a server."""
        self.server = self._stack.enter_context(
            running_server(
                *("--data-dir", str(self._folder)),
                environment={"OPTSERVE_FAILPOINTS": failpoints},
                port=self._port,
            )
        )

    def end(self) -> None:
        """Kill the server, which has no say in it; or wait until it has killed itself."""
        self.server.process.kill()
        self.await_end()

    def await_end(self) -> None:
        """Wait until the server has ended."""
        self.server.process.wait(PATIENCE_S)
        self._stack.close()

    def close(self) -> None:
        """Stop the last one as an operator does."""
        self._stack.close()


@contextmanager
def lives(folder: Path) -> Iterator[Lives]:
    """Give servers a data directory for a block."""
    with kept_port() as port:
        server = Lives(folder, port)
        try:
            yield server
        finally:
            server.close()


def _created(address: str, durability: Durability) -> str:
    with StubDriver(address) as driver:
        return driver.create(durable_spec(durability), model()).status.session_id


def _gradients(session: int, step: int) -> Mapping[str, np.ndarray]:
    return {name: value.numpy() for name, value in gradients(1000 * session + step).items()}


def _train(address: str, session_id: str, number: int, done: Event, least: int) -> list[float]:
    """Take steps until it is enough; return the norm that each was answered with."""
    norms: list[float] = []
    with connect(address, config=CONFIG) as client:
        session = client.join_session(session_id)
        while not done.is_set() or len(norms) < least:
            result = session.step(_gradients(number, len(norms) + 1))
            assert result.step == len(norms) + 1
            norms.append(result.gradient_norm)
    return norms


def _undisturbed(number: int, steps: int) -> tuple[list[float], dict[str, bytes]]:
    """Take the same steps without a server; return the norms and the parameters after them."""
    spec = decode_spec.session_spec(durable_spec(JOURNAL), Limits())
    session = Session(spec, Device("cpu"), Limits())
    session.set_parameters(dict(enumerate(model().values())))
    norms = [
        session.step(list(gradients(1000 * number + step).values())).gradient_norm
        for step in range(1, steps + 1)
    ]
    names = [parameter.name for parameter in spec.parameters]
    values = zip(names, session.parameters, strict=True)
    return norms, {name: bytes_of(value) for name, value in values}


def _parameters(address: str, session_id: str) -> dict[str, bytes]:
    with StubDriver(address) as driver:
        return {name: bytes_of(value) for name, value in driver.download(session_id).items()}


def test_servers_that_are_killed_at_any_moment_lose_and_double_nothing(tmp_path: Path) -> None:
    chance = random.Random(4)
    with lives(tmp_path) as server, ThreadPoolExecutor(SESSIONS) as pool:
        server.begin()
        address, done = server.address, Event()
        ids = [_created(address, FSYNC if i % 2 else JOURNAL) for i in range(SESSIONS)]
        runs: list[Future[list[float]]] = [
            pool.submit(_train, address, session_id, number, done, 50)
            for number, session_id in enumerate(ids)
        ]
        try:
            for _ in range(KILLS):
                time.sleep(chance.uniform(0.1, 1.5))
                server.end()
                server.begin()
        finally:
            done.set()
        for number, (session_id, run) in enumerate(zip(ids, runs, strict=True)):
            norms = run.result(PATIENCE_S)
            expected, parameters = _undisturbed(number, len(norms))
            assert norms == expected
            assert _parameters(address, session_id) == parameters


def test_servers_that_die_at_certain_places_lose_and_double_nothing(tmp_path: Path) -> None:
    durability = Durability(mode=JOURNAL.mode, snapshot_steps=4)
    with lives(tmp_path) as server, ThreadPoolExecutor(1) as pool:
        server.begin(f"{FAILPOINTS[0]}=kill@3")
        done = Event()
        session_id = _created(server.address, durability)
        run = pool.submit(_train, server.address, session_id, 0, done, 0)
        try:
            for place in FAILPOINTS[1:]:
                server.await_end()
                server.begin(f"{place}=kill@3")
            server.await_end()
        finally:
            done.set()
        server.begin()
        norms = run.result(PATIENCE_S)
        expected, parameters = _undisturbed(0, len(norms))
        assert norms == expected
        assert _parameters(server.address, session_id) == parameters


def test_a_session_with_snapshots_goes_on_from_the_last_one_and_says_so(tmp_path: Path) -> None:
    most = 5
    with lives(tmp_path) as server:
        server.begin()
        session_id = _created(server.address, snapshots(most))
        with connect(server.address, config=CONFIG) as client:
            session = client.join_session(session_id)
            for step in range(1, 18):
                session.step(_gradients(0, step))
            server.end()
            server.begin()
            with pytest.raises(StepsLostError) as caught:
                session.step(_gradients(0, 18))
            first = caught.value.resumes_from
            assert 18 - most <= first < 18
            assert session.resume().steps == first - 1
            for step in range(first, 21):
                session.step(_gradients(0, step))
        assert _parameters(server.address, session_id) == _undisturbed(0, 20)[1]


def test_what_is_no_failpoint_keeps_the_server_from_starting(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="is no failpoint"),
        running_server(
            "--data-dir", str(tmp_path), environment={"OPTSERVE_FAILPOINTS": "somewhere"}
        ),
    ):
        pass
