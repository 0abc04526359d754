"""A real Prometheus, and what it has seen."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitoring.scraping import DEPLOY, until
from ports import kept_port

SCRAPE_TIMEOUT_S = 30.0  # Scrapes come five times a second; a busy machine may keep them waiting.
_STOP_TIMEOUT_S = 30.0

_CONFIGURATION = """
global: {{scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 200ms}}
rule_files: ["{rules}"]
"""
_TARGET = "optserve.example:9464"
_JOBS = f"""
scrape_configs:
  - job_name: optserve
    static_configs: [{{targets: ["{_TARGET}"]}}]
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prometheus:
    """A Prometheus process, asked over its HTTP API."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:  # noqa: ANN401 - It is JSON.
        """Return the ``data`` of an answer of the API."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def query(self, query: str) -> list[tuple[dict[str, str], float]]:
        """Return labels and value of each series that ``query`` finds now."""
        result = self.ask("query", query=query)["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def value(self, query: str) -> float | None:
        """Return the value of the only series that ``query`` finds now; None if there is none."""
        found = self.query(query)
        assert len(found) <= 1, found
        return found[0][1] if found else None

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextmanager
def scraping(program: str, folder: Path, target: str, jobs: str = _JOBS) -> Iterator[Prometheus]:
    """Have a Prometheus that scrapes a server, and is ready.

    Args:
        program: The executable.
        folder: For its files; those that ``jobs`` names are there.
        target: Where the server's metrics are, as host and port.
        jobs: How it is to scrape them, with ``optserve.example:9464`` in the target's place.
    """
    assert _TARGET in jobs
    configuration = _CONFIGURATION.format(rules=DEPLOY / "prometheus" / "alerts.yml")
    (folder / "prometheus.yml").write_text(configuration + jobs.replace(_TARGET, target))
    with kept_port() as port, _running(program, folder, f"127.0.0.1:{port}") as prometheus:
        yield prometheus


@contextmanager
def _running(program: str, folder: Path, address: str) -> Iterator[Prometheus]:
    log = folder / "log"
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log_file,
            stderr=log_file,
        )
    prometheus = Prometheus(url=f"http://{address}")
    try:
        until(prometheus.is_ready, SCRAPE_TIMEOUT_S, "Prometheus is ready")
        yield prometheus
    except AssertionError as error:
        error.add_note(log.read_text())
        raise
    finally:
        process.terminate()
        process.wait(_STOP_TIMEOUT_S)
