"""Break things, many times over, and say what was lost by it.

  make soak                                       everything; says how long it takes
  make soak SOAK_SHARE=0.05                       a twentieth of everything
  make soak ARGS="--only simulation"              one of the machines
  make soak ARGS="--only simulation --seed 7"     the same again, to the last choice
  make soak ARGS="--list"                         what there is

It ends with one line a machine, and with exit code 1 if a promise did not hold. What the machines
do: tests/README.md.
"""

from __future__ import annotations

import argparse
import logging
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from types import FrameType

from faults.machines.frame import Effort, Machine, Report, summary_line
from faults.machines.suite import MACHINES
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

EXIT_FAILED = 1  # A promise did not hold, or a machine broke down itself.
EXIT_INTERRUPTED = 130  # As a shell has it: 128 and the number of SIGINT.

LOG_WIDTH = 160  # Where the output goes into a file, nobody knows better.
SEED_BITS = 31


def main() -> int:
    """Run the machines; return the exit code."""
    arguments = _arguments()
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    if arguments.list:
        for machine in MACHINES:
            console.print(f"{machine.name:<12} {machine.summary}")
        return 0
    # What clients bear with is what the machines are for: it is counted, and need not be told.
    logging.getLogger("optserve_client").setLevel(logging.ERROR)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    chosen = [each for each in MACHINES if not arguments.only or each.name in arguments.only]
    efforts = [_effort(machine, arguments) for machine in chosen]
    expected_s = sum(
        machine.whole_s * effort.count / machine.whole_count
        for machine, effort in zip(chosen, efforts, strict=True)
    )
    console.print(f"This takes about {_duration(expected_s)}. Seed: {arguments.seed}")
    try:
        reports = _run(chosen, efforts, console)
    except KeyboardInterrupt:
        console.print("\nInterrupted: nothing is left running.")
        return EXIT_INTERRUPTED
    for machine, report in zip(chosen, reports, strict=True):
        for failure in report.failures:
            console.print(f"{machine.name}: {failure}", style="red", markup=False, soft_wrap=True)
    for machine, report in zip(chosen, reports, strict=True):
        style = "green" if report.ok else "bold red"
        console.print(summary_line(machine, report), style=style, markup=False, soft_wrap=True)
    return 0 if all(report.ok for report in reports) else EXIT_FAILED


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m faults.machines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        action="extend",
        nargs="+",
        default=[],
        choices=[machine.name for machine in MACHINES],
        metavar="NAME",
        help="run only these machines",
    )
    parser.add_argument("--list", action="store_true", help="list the machines, and exit")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of everything, how much (default: all of it)"
    )
    parser.add_argument("--count", type=int, help="how many for each machine, whatever the share")
    parser.add_argument(
        "--seed",
        type=int,
        default=secrets.randbits(SEED_BITS),
        help="what all choices come from (default: another one each time)",
    )
    return parser.parse_args()


def _effort(machine: Machine, arguments: argparse.Namespace) -> Effort:
    # Less than in `make test` is no test: an overload by two clients is none.
    share = max(machine.test_count, round(machine.whole_count * arguments.share))
    return Effort(count=arguments.count or share, seed=arguments.seed)


def _run(machines: Sequence[Machine], efforts: Sequence[Effort], console: Console) -> list[Report]:
    """Run the machines one after the other; each that breaks down itself has failed."""
    reports = []
    with _progress(console) as progress:
        for machine, effort in zip(machines, efforts, strict=True):
            if not console.is_terminal:
                console.print(f"{machine.name}: {effort.count:,} {machine.unit} ...")
            started_s = time.monotonic()
            bar = progress.add_task(machine.name, total=effort.count)

            def advance(count: int, bar: int = bar) -> None:
                progress.advance(bar, count)  # type: ignore[arg-type] # A TaskID is an int.

            try:
                report = machine.run(Effort(count=effort.count, seed=effort.seed, advance=advance))
            except Exception:  # noqa: BLE001 - The others are still worth their time.
                report = Report(tried=0, failures=(traceback.format_exc(),))
            progress.update(bar, completed=effort.count)
            if not console.is_terminal:
                console.print(f"{machine.name}: {_duration(time.monotonic() - started_s)}")
            reports.append(report)
    return reports


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
