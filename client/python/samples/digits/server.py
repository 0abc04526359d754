"""A server of our own, as a process, for as long as a block runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

_START_TIMEOUT_S = 60.0  # Importing torch for the first time reads gigabytes from the disk.
_STOP_TIMEOUT_S = 10.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where a server listens."""

    address: str
    metrics_address: str


class ServerError(Exception):
    """The server did not start; the message has its last words."""


@contextmanager
def running_server() -> Iterator[Addresses]:
    """Start a server on free ports, and stop it at the end of the block.

    Raises:
        ServerError: It did not start.
    """
    with TemporaryDirectory(prefix="optserve-") as folder:
        ready, log = Path(folder, "ready.json"), Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "optserve_server", "--port", "0"),
                    *("--metrics-port", "0", "--ready-file", str(ready)),
                ],
                stdout=output,
                stderr=output,
                # Ctrl-C in the terminal is for us: we stop it when nobody needs it any more.
                start_new_session=True,
            )
        try:
            yield _wait_until_ready(process, ready, log)
        finally:
            process.terminate()
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_TIMEOUT_S)
            finally:  # It has ended by now, or took too long, or a second Ctrl-C came.
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], ready: Path, log: Path) -> Addresses:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServerError(f"the server did not start:\n{log.read_text(errors='replace')}")
        time.sleep(_POLL_S)
    return Addresses(**json.loads(ready.read_text()))
