"""A real server process, and Debian's own Prometheus and promtool beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from monitored_processes import ROOT, Server, stop, until

START_TIMEOUT_S = 60.0  # Importing torch on a busy machine.


@pytest.fixture(scope="session")
def promtool() -> str:
    return require("promtool")


@pytest.fixture(scope="session")
def prometheus_program() -> str:
    return require("prometheus")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start what the image starts, on ports of this machine's choice."""
    folder = tmp_path_factory.mktemp("server")
    ready, log = folder / "ready.json", folder / "log"
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            [
                *(sys.executable, *image_command()[1:]),
                *("--host", "127.0.0.1", "--port", "0"),
                *("--metrics-host", "127.0.0.1", "--metrics-port", "0"),
                *("--device", "cpu", "--ready-file", str(ready)),
            ],
            stderr=log_file,
        )
    try:
        until(lambda: ready.exists() or process.poll() is not None, START_TIMEOUT_S, "ready server")
        assert process.poll() is None, log.read_text()
        yield Server(**json.loads(ready.read_text()))
    finally:
        assert stop(process) == 0, log.read_text()


def image_command() -> list[str]:
    """Return what a container of the image runs: ENTRYPOINT and CMD."""
    words: list[str] = []
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        instruction, _, rest = line.partition(" ")
        if instruction in {"ENTRYPOINT", "CMD"}:
            words += json.loads(rest)
    return words


def require(tool: str) -> str:
    """Return the path of a tool of Debian's package ``prometheus``; skip, or fail, without it."""
    path = shutil.which(tool)
    if path is None:
        missing = f"{tool} is not installed (Debian: apt-get install prometheus)"
        if os.environ.get("OPTSERVE_REQUIRE_PROMETHEUS") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    return path
