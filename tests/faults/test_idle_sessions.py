"""Sessions that nobody uses make room; what counts as use is what the contract says."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from drivers_grpc import StubDriver
from event_loop import TIMEOUT_S
from messages import chunks_of, headers_of
from refusals import refused, translated
from scenarios.models import create, spec
from server_process import running_server

from optserve.v1.optimizer_pb2 import SGD
from optserve.v1.optimizer_service_pb2 import (
    GetServerInfoRequest,
    UploadBegin,
    UploadParametersRequest,
)

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


def test_a_session_is_in_use_for_as_long_as_an_upload_takes() -> None:
    values = {"w": torch.ones(30_000)}
    with (
        running_server("--idle-timeout-s", "1") as server,
        StubDriver(server.address) as driver,
    ):
        session_id = driver.create(spec(SGD(), parameters=values)).status.session_id
        begin = UploadBegin(session_id=session_id, parameters=headers_of(values))

        def requests() -> Iterator[UploadParametersRequest]:
            yield UploadParametersRequest(begin=begin)
            for chunks in chunks_of(values.values(), 30_000):
                time.sleep(0.8)
                yield UploadParametersRequest(chunks=chunks)

        started = time.monotonic()
        with translated():
            driver.stub.UploadParameters(requests(), timeout=TIMEOUT_S)
        assert time.monotonic() - started > 3
        assert torch.equal(driver.download(session_id)["w"], values["w"])
