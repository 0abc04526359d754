"""Where, when and with what something was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from benchmarks.job import TESTS

_PACKAGES = ("optserve-server", "torch", "grpcio", "protobuf", "numpy", "ray")


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What a result is worthless without."""

    command: str
    time: str
    """In UTC, as ISO 8601 has it."""
    commit: str
    """Of the repository, with "+changes" if files differ from it; empty outside of one."""
    processor: str
    cores: int
    memory_gib: float
    system: str
    cuda_device: str
    """Empty if there is none."""
    versions: dict[str, str]


def circumstances(arguments: list[str]) -> Circumstances:
    """Describe this machine, and this moment."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Circumstances(
        command=" ".join(["python -m benchmarks", *arguments]),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(memory / 2**30, 1),
        system=f"{platform.system()} {platform.release()}",
        cuda_device=torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        versions={"python": platform.python_version(), **_versions()},
    )


def _commit() -> str:
    head, changes = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain")
    return head + ("+changes" if head and changes else "")


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=TESTS, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
