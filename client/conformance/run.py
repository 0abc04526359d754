"""Let every client take the exam against a real server, and print who passed what.

python run.py [--client NAME]... [--scenario NAME]... [--require NAME]...
              [--folder SCENARIOS] [--address HOST:PORT]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from cuts import cut_wire

HERE = Path(__file__).parent
NODE = HERE.parent / "node"
_START_TIMEOUT_S = 120
_STOP_TIMEOUT_S = 30
_EXAM_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """How a client takes the exam."""

    command: Sequence[str]
    """Scenarios and the target are added to it."""
    obstacle: str | None
    """Why it cannot run here; None if it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of one client."""

    failures: dict[str, str | None] = field(default_factory=dict)
    """By scenario: what failed; None where it passed."""
    trouble: str | None = None
    """What kept the runner from reporting every scenario; None if nothing did."""


def runners() -> dict[str, Runner]:
    """Return the runner of every client."""
    return {
        "python": Runner(
            command=[sys.executable, "-m", "optserve_client.conform"],
            obstacle=None
            if importlib.util.find_spec("optserve_client")
            else "optserve-client is not installed",
        ),
        "node": Runner(
            command=["node", str(NODE / "src" / "conform.js")],
            obstacle="node is not installed"
            if shutil.which("node") is None
            else None
            if (NODE / "node_modules").is_dir()
            else "its packages are not installed: npm ci --prefix client/node",
        ),
    }


@contextmanager
def server() -> Iterator[str]:
    """Run a server and yield its address."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.json"
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "optserve_server", "--device", "cpu"),
                *("--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"),
                *("--ready-file", str(ready), "--data-dir", str(Path(folder) / "data")),
            ],
            # Wider vector units round sums differently; the scenarios are computed with none.
            env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
        )
        try:
            yield _address_of(process, ready)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_TIMEOUT_S)
            finally:
                process.kill()


def examine(runner: Runner, scenarios: Sequence[Path], address: str) -> Report:
    """Let a client take the exam: those scenarios by themselves that have a wire of their own."""
    cuts = {path: json.loads(path.read_text()).get("cuts", []) for path in scenarios}
    reports = [_sit(runner, [path for path in scenarios if not cuts[path]], address)]
    for path in (path for path in scenarios if cuts[path]):
        with cut_wire(address, cuts[path]) as wire:
            report = _sit(runner, [path], wire.address)
        if wire.ahead and report.failures.get(path.stem, "unreported") is None:
            done = len(cuts[path]) - len(wire.ahead)
            problem = f"the connection was cut {done} times, and not {len(cuts[path])}"
            report = replace(report, failures={path.stem: problem})
        reports.append(report)
    failures = {name: each for report in reports for name, each in report.failures.items()}
    troubles = [report.trouble for report in reports if report.trouble]
    if missing := [path.stem for path in scenarios if path.stem not in failures]:
        troubles.append(f"it did not report {', '.join(missing)}")
    return Report(failures=failures, trouble="; ".join(troubles) or None)


def _sit(runner: Runner, scenarios: Sequence[Path], address: str) -> Report:
    if not scenarios:
        return Report()
    try:
        done = subprocess.run(
            [*runner.command, *map(str, scenarios), "--target", address],
            stdout=subprocess.PIPE,
            text=True,
            timeout=_EXAM_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Report(trouble=f"it did not end within {_EXAM_TIMEOUT_S} s")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    failures = {line["scenario"]: _problem(line["failure"]) for line in lines}
    if done.returncode != any(failures.values()):
        return Report(failures=failures, trouble=f"its exit code was {done.returncode}")
    return Report(failures=failures)


def main() -> int:
    """Examine the clients; return 1 if one of them failed, or was required and could not run."""
    known = runners()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--client", action="append", choices=known, help="only this one")
    parser.add_argument("--scenario", action="append", help="only this one")
    parser.add_argument("--require", action="append", choices=known, default=[], help="must run")
    parser.add_argument(
        "--folder", type=Path, default=HERE / "scenarios", help="where the scenarios are"
    )
    parser.add_argument("--address", help="of a server that runs already")
    args = parser.parse_args()
    names = args.scenario or sorted(path.stem for path in args.folder.glob("*.json"))
    scenarios = [args.folder / f"{name}.json" for name in names]
    chosen = {name: known[name] for name in args.client or known}
    able = {name: runner for name, runner in chosen.items() if runner.obstacle is None}
    reports: dict[str, Report] = {}
    if args.address:
        reports = {name: examine(each, scenarios, args.address) for name, each in able.items()}
    elif able:
        with server() as address:
            reports = {name: examine(each, scenarios, address) for name, each in able.items()}
    _print(names, reports)
    for name, runner in chosen.items():
        if runner.obstacle:
            print(f"{name} was not run: {runner.obstacle}")
    absent = set(args.require) - able.keys()
    bad = any(report.trouble or any(report.failures.values()) for report in reports.values())
    return 1 if bad or absent else 0


def _print(names: Sequence[str], reports: dict[str, Report]) -> None:
    width = max(map(len, names), default=0)
    print(" " * width, *reports)
    for name in names:
        marks = (_mark(report, name).ljust(len(client)) for client, report in reports.items())
        print(" ".join([name.ljust(width), *marks]).rstrip())
    for client, report in reports.items():
        for name, problem in report.failures.items():
            if problem:
                print(f"{client} failed {name}: {problem}")
        if report.trouble:
            print(f"{client}: {report.trouble}")


def _mark(report: Report, name: str) -> str:
    if name not in report.failures:
        return "-"
    return "FAIL" if report.failures[name] else "pass"


def _problem(failure: dict[str, object] | None) -> str | None:
    return None if failure is None else f"act {failure['act']}: {failure['problem']}"


def _address_of(process: subprocess.Popen[bytes], ready: Path) -> str:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not ready.exists():
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {process.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the server was not ready within {_START_TIMEOUT_S} s")
        time.sleep(0.05)
    address: str = json.loads(ready.read_text())["address"]
    return address


if __name__ == "__main__":
    sys.exit(main())
