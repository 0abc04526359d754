"""What this process holds of the machine's memory, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def memory(key: str) -> int:
    """Return a line of /proc/self/status in bytes: VmRSS is now, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def forget_peak() -> None:
    """Count the peak from what the process holds now: proc(5), clear_refs."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
