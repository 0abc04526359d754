"""Processes that the tests of this folder start and stop."""

from __future__ import annotations

import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "server" / "deploy"

STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server process, ready."""

    address: str
    metrics_address: str

    def exposition(self) -> str:
        """Return what a scrape gets."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=10) as answer:
            text = answer.read()
        assert isinstance(text, bytes)
        return text.decode()


def until(happened: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait until ``happened``, asking often."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


def stop(process: subprocess.Popen[bytes]) -> int:
    """Ask a process to end, and return its exit code; kill it if it does not listen."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
