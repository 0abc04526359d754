"""A real server that answers ahead: told to end in the middle of a step, and disturbed for long."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from drivers_grpc import StubDriver
from event_loop import TIMEOUT_S
from faults.overlapping import Local, adam_spec, begin_half, disturb_often, model
from refusals import RefusedError, refused
from server_process import STOP_TIMEOUT_S, running_server
from streams import raw_stream

MIB = 1 << 20
ROUNDS, DISTURBANCES = 4, 50


def test_a_server_that_drains_lets_an_open_step_come_to_its_end() -> None:
    local = Local()
    with running_server("--overlap", "on") as server, StubDriver(server.address) as driver:
        session_id = driver.create(adam_spec()).status.session_id
        driver.upload(session_id, model())
        with raw_stream(driver, session_id) as stream:
            rest = begin_half(stream, 1)
            stream.receive_ahead()
            server.process.send_signal(signal.SIGTERM)
            _wait_until_it_drains(driver)
            stream.chunks(rest)
            stream.end()
            answer = stream.answer()
            assert (answer.begins, answer.parameters) == (1, local.step(1))
            with refused("DRAINING"):
                stream.receive()
        assert server.process.wait(STOP_TIMEOUT_S) == 0
        assert "Traceback" not in server.log.read_text()


def _wait_until_it_drains(driver: StubDriver) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            driver.delete(driver.create(adam_spec()).status.session_id)
        except RefusedError as error:
            if error.reason == "DRAINING":
                return
            raise
        time.sleep(0.01)
    raise AssertionError("the server does not drain")


def test_disturbed_steps_leave_a_server_as_large_as_it_was() -> None:
    sizes, threads = [], []
    with running_server("--overlap", "on") as server, StubDriver(server.address) as driver:
        for _ in range(ROUNDS):
            session_id = driver.create(adam_spec()).status.session_id
            driver.upload(session_id, model())
            disturb_often(driver, session_id, DISTURBANCES)
            driver.delete(session_id)
            sizes.append(server.resident_bytes())
            threads.append(len(list(Path(f"/proc/{server.process.pid}/task").iterdir())))
        assert "Traceback" not in server.log.read_text()
    # glibc keeps some of what is freed, so a round may find more of it than the one before. A leak
    # of one preview, of one gradient, or of what waits to be sent would show in each of the steps.
    assert sizes[-1] - sizes[1] < 48 * MIB, sizes
    assert max(threads[1:]) <= threads[0] + 2, threads
