"""The demo, as `make demo` runs it: it trains nine models well, and leaves nothing running."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from server_process import running_server
from sources import ROOT

pytestmark = pytest.mark.timeout(300)

OPTIMIZERS = [
    *("SGD", "SGD with momentum", "Nesterov", "RMSprop", "Adadelta"),
    *("Adagrad", "Adam", "AMSGrad", "Adamax"),
]


@contextmanager
def demo(folder: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """Run the demo in a process group of its own, as a terminal does."""
    command = [sys.executable, "-m", "samples.digits", "--output", str(folder), *flags]
    with subprocess.Popen(
        command,
        cwd=ROOT / "client" / "python",
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def read_until(process: subprocess.Popen[str], what: str) -> str:
    """Return what the process has printed up to the first line with ``what``."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if what in line:
            return text
    pytest.fail(f"the demo has ended:\n{text}")


def is_open(printed: str) -> bool:
    """Return whether the server that the demo has started still listens."""
    address = re.search(r"http://([\d.]+):(\d+)/metrics", printed)
    assert address is not None, printed
    with socket.socket() as probe:
        return probe.connect_ex((address[1], int(address[2]))) == 0


def test_demo_trains_nine_models_on_real_digits(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert not is_open(printed)
    runs = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert [run["optimizer"] for run in runs] == OPTIMIZERS
    assert all(name in printed for name in OPTIMIZERS)
    assert max(run["validation_accuracy"] for run in runs) >= 0.97
    assert min(run["validation_accuracy"] for run in runs) >= 0.95
    assert max(run["train_loss"] for run in runs) < 0.1  # From 2.3, which is guessing.
    assert max(run["validation_loss"] for run in runs) < 0.2
    assert min(run["steps_per_second"] for run in runs) > 0
    width, height = png_size(tmp_path / "curves.png")
    assert width >= 1000
    assert height >= 800


def test_ctrl_c_ends_the_demo_and_its_server(tmp_path: Path) -> None:
    with demo(tmp_path, "--epochs", "1000") as process:
        printed = read_until(process, "epoch")
        assert is_open(printed)
        os.killpg(process.pid, signal.SIGINT)
        rest, _ = process.communicate()
    assert process.returncode == 130, rest
    assert "Interrupted" in rest
    assert "Traceback" not in rest
    assert not is_open(printed)
    assert not list(tmp_path.iterdir())


def test_demo_that_loses_its_server_fails(tmp_path: Path) -> None:
    with (
        running_server() as server,
        demo(tmp_path, "--epochs", "1000", "--target", server.address) as process,
    ):
        read_until(process, "epoch")
        server.process.kill()
        printed, _ = process.communicate()
    assert process.returncode == 1, printed
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def png_size(path: Path) -> tuple[int, int]:
    """Return width and height in pixels, from the header."""
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", header[16:24])
    return width, height
