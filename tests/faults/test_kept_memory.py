"""What sessions leave behind goes back to the system, even if others live on in between."""

from __future__ import annotations

import time

import torch
from drivers_grpc import StubDriver
from scenarios.models import create, spec
from server_process import running_server

from optserve.allocator import KEPT_BYTES
from optserve.v1.optimizer_pb2 import SGD

MIB = 1 << 20
SESSIONS = 140
SESSION_BYTES = 4 * MIB - 64 * 1024  # As much as one message holds.
STAYING = 10  # One in so many: glibc by itself gives back what lies behind the last of them.
SLACK_BYTES = 32 * MIB
WAIT_S = 15.0


def test_memory_between_sessions_that_stay_is_given_back() -> None:
    values = {"w": torch.ones(SESSION_BYTES // 4)}
    flags = ("--memory-bytes-max", str(4 * SESSIONS * SESSION_BYTES))
    with running_server(*flags) as server, StubDriver(server.address) as driver:
        before = server.resident_bytes()
        wanted = spec(SGD(lr=1), parameters=values)
        ids = [create(driver, wanted, values) for _ in range(SESSIONS)]
        assert server.resident_bytes() - before > SESSIONS * SESSION_BYTES
        staying = ids[STAYING - 1 :: STAYING]
        for session_id in set(ids) - set(staying):
            driver.delete(session_id)
        allowed = len(staying) * SESSION_BYTES + KEPT_BYTES + SLACK_BYTES
        deadline = time.monotonic() + WAIT_S
        while (grown := server.resident_bytes() - before) > allowed:
            assert time.monotonic() < deadline, f"{grown >> 20} of {allowed >> 20} MiB"
            time.sleep(0.1)
