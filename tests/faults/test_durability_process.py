"""Durable sessions of a real server, and what its host gives it."""

from __future__ import annotations

from pathlib import Path

from drivers_grpc import StubDriver
from faults.durable import JOURNAL, durable_spec, stepped
from scenarios.models import model
from server_process import running_server

SOFT, HARD = 100, 1000


def test_journals_do_not_run_out_of_descriptors_while_there_are_some(tmp_path: Path) -> None:
    limited = ("bash", "-c", f'ulimit -Sn {SOFT}; ulimit -Hn {HARD}; exec "$@"', "--")
    with (
        running_server("--data-dir", str(tmp_path / "data"), prefix=limited) as server,
        StubDriver(server.address) as driver,
    ):
        for _ in range(SOFT):  # Each has a file open from its first change on.
            session_id = driver.create(durable_spec(JOURNAL), model()).status.session_id
            stepped(driver, session_id, 1, 1)
