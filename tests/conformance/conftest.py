"""What the exam needs: a server whose bits are those of the scenarios, and Node."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_process import running_server

CLIENTS = Path(__file__).parents[2] / "client"


@pytest.fixture(scope="session")
def exam_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a server that rounds sums as the scenarios do, and has a place for checkpoints."""
    flags = ["--data-dir", str(tmp_path_factory.mktemp("exam"))]
    # Wider vector units round sums differently; the scenarios are computed with none.
    with running_server(*flags, environment={"ATEN_CPU_CAPABILITY": "default"}) as server:
        yield server.address


@pytest.fixture(scope="session")
def node() -> Path:
    """Return the folder of the Node client, ready to run; skip the test, or fail it, without."""
    folder = CLIENTS / "node"
    if shutil.which("node") is None:
        _do_without("node is not installed")
    if not (folder / "node_modules").is_dir():
        _do_without("the Node client's packages are not installed: npm ci --prefix client/node")
    return folder


def _do_without(reason: str) -> None:
    if os.environ.get("OPTSERVE_REQUIRE_NODE") == "1":
        pytest.fail(f"{reason}, and OPTSERVE_REQUIRE_NODE=1 asks for it")
    pytest.skip(reason)
