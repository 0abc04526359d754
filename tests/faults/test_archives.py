"""A data directory that is lost comes back from its archive, through a real server."""

from __future__ import annotations

import shutil
from pathlib import Path

from drivers_grpc import StubDriver
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
