"""A real server, as its users start it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 60.0  # Importing torch on a busy machine.
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerProcess:
    """A server process that serves."""

    address: str
    metrics_address: str
    process: subprocess.Popen[bytes]
    log: Path

    def stop(self, signal_number: signal.Signals = signal.SIGTERM) -> int:
        """Ask the server to end, and return its exit code; kill it if it does not listen."""
        self.process.send_signal(signal_number)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def resident_bytes(self) -> int:
        """Return how much memory the process holds now."""
        return self._status_bytes("VmRSS")

    def peak_bytes(self) -> int:
        """Return how much memory the process has held at most."""
        return self._status_bytes("VmHWM")

    def _status_bytes(self, key: str) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024


@contextmanager
def running_server(
    *flags: str,
    environment: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
    port: int = 0,
) -> Iterator[ServerProcess]:
    """Start a server on free ports; at the end stop it, if it still runs: its exit code must be 0.

    Args:
        flags: Of the command line, such as ``"--sessions-max", "3"``.
        environment: Variables beside this process's own.
        prefix: What the command begins with, such as ``ip netns exec NAME``.
        port: To serve gRPC on, where it must be a certain one.
    """
    with tempfile.TemporaryDirectory(prefix="optserve-") as folder:
        ready, log = Path(folder, "ready.json"), Path(folder, "log")
        command = [*prefix, sys.executable, "-m", "optserve_server", "--device", "cpu", *flags]
        command += ["--port", str(port), "--metrics-port", "0", "--ready-file", str(ready)]
        with log.open("wb") as log_file:
            process = subprocess.Popen(
                command, stderr=log_file, env={**os.environ, **(environment or {})}
            )
        try:
            _wait_for(ready, process, log)
            server = ServerProcess(process=process, log=log, **json.loads(ready.read_text()))
            yield server
            if process.poll() is None:
                assert server.stop() == 0, log.read_text()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait_for(ready: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready.exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"the server is not ready: {log.read_text()}"
        time.sleep(0.05)
