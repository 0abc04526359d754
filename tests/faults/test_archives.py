"""A data directory that is lost comes back from its archive, through a real server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from drivers_grpc import StubDriver
from event_loop import TIMEOUT_S
from faults.durable import FSYNC, durable_spec, see, stepped
from scenarios.models import model
from server_process import running_server


def test_sessions_come_back_from_an_archive_when_the_disk_is_lost(tmp_path: Path) -> None:
    data, archive = tmp_path / "data", tmp_path / "archive"
    flags = ("--data-dir", str(data), "--archive-url", f"file://{archive}")
    with running_server(*flags) as server, StubDriver(server.address) as driver:
        session_id = driver.create(durable_spec(FSYNC), model()).status.session_id
        stepped(driver, session_id, 1, 5)
        seen = see(driver, session_id)
    shutil.rmtree(data)
    with running_server(*flags, "--archive-restore", "true") as server:
        assert "restored from the archive" in server.log.read_text()
        with StubDriver(server.address) as driver:
            assert see(driver, session_id) == seen
            stepped(driver, session_id, 6, 7)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_stop_while_it_restores_stops_and_begins_anew(
    tmp_path: Path, number: signal.Signals
) -> None:
    data, archive = tmp_path / "data", tmp_path / "archive"
    flags = ["--data-dir", str(data), "--archive-url", f"file://{archive}"]
    with running_server(*flags) as server, StubDriver(server.address) as driver:
        session_id = driver.create(durable_spec(FSYNC), model()).status.session_id
        seen = see(driver, session_id)
    shutil.rmtree(data)
    flags += ["--archive-restore", "true"]
    endless = archive / "sessions" / session_id / "journal-00000000000000000001.log"
    os.mkfifo(endless)  # Nobody writes to it: a store that hangs.
    command = [sys.executable, "-m", "optserve_server", "--device", "cpu", "--log-format", "json"]
    with (
        (tmp_path / "log").open("w+b") as log,
        subprocess.Popen([*command, *flags], stderr=log) as process,
    ):
        deadline_s = time.monotonic() + TIMEOUT_S
        while not (data / "sessions" / session_id / "head.json").exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(TIMEOUT_S) == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["message"] for line in lines] == ["stopped before it served"], lines
    endless.unlink()
    with running_server(*flags) as server, StubDriver(server.address) as driver:
        assert see(driver, session_id) == seen
