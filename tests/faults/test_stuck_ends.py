"""A server that is told to stop leaves in time, even if something in it hangs."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import torch
from drivers import take
from drivers_grpc import StubDriver
from event_loop import TIMEOUT_S
from refusals import RefusedError
from scenarios.models import spec
from server_process import ServerProcess, running_server

from optserve.v1.optimizer_pb2 import SGD
from optserve_server.last_resort import EXIT_STUCK

DRAIN_TIMEOUT_S = 1.0
GRACE_S = 3.0  # As operations.md promises.
LARGE = {"large": torch.zeros(100_000)}  # Its steps are made in a thread.

# Python imports it at its start. Steps of large parameters then last for ever.
SITE = """
import threading
import torch

step = torch.optim.SGD.step

def hang(self, *arguments):
    if self.param_groups[0]["params"][0].numel() == 100_000:
        threading.Event().wait()
    return step(self, *arguments)

torch.optim.SGD.step = hang
"""


@contextmanager
def _stuck_server(folder: Path, drain_timeout_s: float) -> Iterator[ServerProcess]:
    """Have a server with a step under way that will never end."""
    (folder / "sitecustomize.py").write_text(SITE)
    with (
        running_server(
            "--drain-timeout-s",
            str(drain_timeout_s),
            environment={"PYTHONPATH": str(folder)},
        ) as server,
        StubDriver(server.address) as driver,
        ThreadPoolExecutor(1) as client,
    ):
        session = driver.create(spec(SGD(lr=1), parameters=LARGE))
        driver.upload(session.status.session_id, LARGE)

        def step() -> None:
            with driver.worker(session.status.session_id) as worker:
                take(worker, 1, LARGE)

        under_way = client.submit(step)
        time.sleep(0.5)  # Until the server computes.
        yield server
        with pytest.raises((RefusedError, grpc.RpcError)):
            under_way.result(TIMEOUT_S)


def test_a_server_whose_thread_hangs_leaves_after_the_drain(tmp_path: Path) -> None:
    with _stuck_server(tmp_path, DRAIN_TIMEOUT_S) as server:
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(TIMEOUT_S) == EXIT_STUCK
        took_s = time.monotonic() - started
        assert DRAIN_TIMEOUT_S <= took_s < DRAIN_TIMEOUT_S + GRACE_S + 1
        log = server.log.read_text()
        assert "work has not come to its end" in log
        assert "optserve_0" in log, "it names the thread"


def test_a_second_signal_does_not_wait_for_a_thread_that_hangs(tmp_path: Path) -> None:
    with _stuck_server(tmp_path, 600) as server:
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(1)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(TIMEOUT_S) == EXIT_STUCK
        assert time.monotonic() - started < GRACE_S + 1
