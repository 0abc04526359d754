"""A real server, started as the image starts it, and Debian's own Prometheus and promtool."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator

import pytest
from monitoring.scraping import ROOT
from server_process import ServerProcess, running_server


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """Start a server for these tests alone, for they count what it does."""
    python, _module, _name, *flags = image_command()
    assert python == "python"
    with running_server(*flags, "--host", "127.0.0.1", "--metrics-host", "127.0.0.1") as process:
        yield process


@pytest.fixture(scope="session")
def promtool() -> str:
    return require("promtool")


@pytest.fixture(scope="session")
def prometheus_program() -> str:
    return require("prometheus")


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
