"""What is told of sessions that survive: of their journals, snapshots, and of coming back."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from drivers import take
from drivers_grpc import StubDriver
from faults.checkpointing import Checkpoints
from faults.durable import FSYNC, durable_spec
from monitoring.scraping import scrape
from monitoring.test_exposition import call, value
from scenarios.models import gradients, model
from server_process import ServerProcess, running_server

STEPS = 3


def told(server: ServerProcess, series: str) -> float:
    return value(scrape(server.metrics_address), series)


def test_what_survives_is_counted_and_timed_from_its_writing_to_its_coming_back(
    tmp_path: Path,
) -> None:
    with running_server("--data-dir", str(tmp_path)) as server:
        with StubDriver(server.address) as driver:
            session_id = driver.create(durable_spec(FSYNC), model()).status.session_id
            written = told(server, "optserve_journal_bytes_total")
            with driver.worker(session_id) as worker:
                for step in range(1, STEPS + 1):
                    take(worker, step, gradients(step))
            gradient_bytes = sum(each.nbytes for each in gradients(1).values())
            assert told(server, "optserve_journal_bytes_total") >= written + STEPS * gradient_bytes
            assert told(server, "optserve_journal_sync_duration_seconds_count") >= STEPS
            assert told(server, "optserve_restore_duration_seconds_count") == 0
            Checkpoints(driver).save(session_id)
            saved = call("handled_total", "SaveCheckpoint", ',grpc_type="unary"', 'grpc_code="OK",')
            assert told(server, saved) == 1
        server.process.kill()
        server.process.wait()
    with running_server("--data-dir", str(tmp_path)) as server:
        assert told(server, "optserve_sessions_parked") == 1
        with StubDriver(server.address) as driver:
            assert driver.get(session_id).status.steps == STEPS
            driver.get(session_id)
        assert told(server, "optserve_sessions_parked") == 0
        assert told(server, "optserve_restore_duration_seconds_count") == 1
        assert 0 < told(server, "optserve_restore_duration_seconds_sum") < 60
        assert told(server, "optserve_snapshot_failures_total") == 0


def test_an_archive_that_fails_is_counted_until_it_has_everything(tmp_path: Path) -> None:
    begun_s, archive = time.time(), tmp_path / "archive"
    archive.write_text("a file, where a directory is wanted")
    flags = {"--data-dir": tmp_path / "data", "--archive-url": archive.as_uri()}
    words = [str(word) for flag in flags.items() for word in flag]
    with running_server(*words, "--archive-interval-s", "0.05") as server:
        _until(lambda: told(server, "optserve_archive_failures_total") >= 2)
        assert told(server, "optserve_last_archive_timestamp_seconds") == 0
        archive.unlink()
        _until(lambda: told(server, "optserve_last_archive_timestamp_seconds") >= begun_s)


def _until(holds: Callable[[], bool]) -> None:
    """Wait for something; that it never comes is what the test's timeout is for."""
    while not holds():
        time.sleep(0.02)
