"""Sessions that nobody uses make room; what counts as use is what the contract says."""

from __future__ import annotations

import time

from drivers_grpc import StubDriver
from event_loop import TIMEOUT_S
from refusals import refused
from scenarios.models import create, spec
from server_process import running_server

from optserve.v1.optimizer_pb2 import SGD
from optserve.v1.optimizer_service_pb2 import GetServerInfoRequest

IDLE_TIMEOUT_S = 3.0


def _ids(driver: StubDriver) -> set[str]:
    return {status.session_id for status in driver.sessions().sessions}


def test_only_a_session_that_nobody_uses_is_deleted() -> None:
    with (
        running_server("--idle-timeout-s", str(IDLE_TIMEOUT_S)) as server,
        StubDriver(server.address) as driver,
    ):
        info = driver.stub.GetServerInfo(GetServerInfoRequest(), timeout=TIMEOUT_S)
        assert info.limits.idle_timeout_s == IDLE_TIMEOUT_S
        idle, asked_for, streamed = (create(driver, spec(SGD())) for _ in range(3))
        started = time.monotonic()
        with driver.worker(streamed):
            while idle in _ids(driver):
                driver.get(asked_for)
                assert time.monotonic() - started < TIMEOUT_S
                time.sleep(IDLE_TIMEOUT_S / 20)
            assert time.monotonic() - started >= IDLE_TIMEOUT_S
            assert _ids(driver) == {asked_for, streamed}
        with refused("SESSION_NOT_FOUND"):
            driver.get(idle)
