"""What the tests of this folder share: where things are, a scrape, patience."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "server" / "deploy"


def scrape(metrics_address: str) -> str:
    """Return what Prometheus would get."""
    with urllib.request.urlopen(f"http://{metrics_address}/metrics", timeout=10) as answer:
        text = answer.read()
    assert isinstance(text, bytes)
    return text.decode()


def until(happened: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait until ``happened``, asking often."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)
