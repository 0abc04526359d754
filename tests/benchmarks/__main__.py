"""Measure optserve beside its peers: in the same run, in turn, and nobody's result unchecked.

  make bench                              everything
  make bench-check                        every claim, in less than ten minutes
  make bench ARGS="--only loopback"       one of them
  make bench ARGS="--list"                what there is
  make bench ARGS="--publish"             everything; the documents show it

What is measured, and how to read it: tests/benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch
from benchmarks.arena import Effort
from benchmarks.circumstances import circumstances
from benchmarks.conditions import Benchmark, Conditions
from benchmarks.figures import Comparison, Row
from benchmarks.job import TESTS, SkippedError
from benchmarks.publish import publish
from benchmarks.record import Record
from benchmarks.report import comparison_table, row_line
from benchmarks.suite import BENCHMARKS
from rich.console import Console

EXIT_SHORT = 1  # A claim does not hold, or a benchmark broke down.
EXIT_INTERRUPTED = 130  # As a shell has it: 128 and the number of SIGINT.

LOG_WIDTH = 120  # Where the output goes into a file, nobody knows better.

THOROUGH = Effort(rounds=9, steps=3)
CHECK = Effort(rounds=5, steps=2)


def main() -> int:
    """Run the benchmarks; return the exit code."""
    arguments = _arguments()
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    if arguments.list:
        for benchmark in BENCHMARKS:
            console.print(f"{benchmark.name:<14} {benchmark.summary}", highlight=False)
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    chosen = [
        benchmark
        for benchmark in BENCHMARKS
        if benchmark.name in arguments.only
        or (not arguments.only and not (arguments.check and benchmark.thorough_only))
    ]
    try:
        if arguments.source:
            record = Record.read(arguments.source)
        else:
            record = _measure(chosen, arguments, console)
            record.write(arguments.output)
            console.print(f"\nwritten: {arguments.output}", highlight=False)
    except KeyboardInterrupt:
        console.print("\nInterrupted: nothing is left running.")
        return EXIT_INTERRUPTED
    if arguments.publish:
        publish(record)
    width = max((len(row.name) for row in record.rows), default=0)
    for row in record.rows:
        console.print(row_line(row, width), soft_wrap=True)
    for name, reason in record.failures.items():
        console.print(f"{name} broke down: {reason}", style="red", markup=False, highlight=False)
    good = not record.failures and all(row.verdict != "short" for row in record.rows)
    return 0 if good else EXIT_SHORT


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="measure only what claims need")
    parser.add_argument(
        "--only",
        action="extend",
        nargs="+",
        default=[],
        choices=[benchmark.name for benchmark in BENCHMARKS],
        metavar="NAME",
        help="run only these benchmarks",
    )
    parser.add_argument("--list", action="store_true", help="list the benchmarks, and exit")
    parser.add_argument("--rounds", type=int, help="how many rounds; contenders take turns in each")
    parser.add_argument("--steps", type=int, help="how many steps in a round, for each contender")
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="how many cores torch uses, wherever something is stepped (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=TESTS.parent / "build" / "benchmarks.json",
        help="file to write (default: %(default)s)",
    )
    parser.add_argument(
        "--publish",
        action="store_true",
        help="also replace the results that are committed, and what the documents show of them",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="measure nothing: take what --output has written earlier",
    )
    return parser.parse_args()


def _measure(
    chosen: Sequence[Benchmark], arguments: argparse.Namespace, console: Console
) -> Record:
    effort = CHECK if arguments.check else THOROUGH
    effort = Effort(rounds=arguments.rounds or effort.rounds, steps=arguments.steps or effort.steps)
    comparisons: list[Comparison] = []
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    failures: dict[str, str] = {}
    with console.status("") as status:

        def report(line: str) -> None:
            status.update(line)
            if not console.is_terminal:
                console.print(line, soft_wrap=True, highlight=False)

        conditions = Conditions(
            effort=effort,
            thorough=not arguments.check,
            threads=arguments.threads,
            report=report,
        )
        for benchmark in chosen:
            try:
                findings = benchmark.run(conditions)
            except SkippedError as reason:
                skipped[benchmark.name] = str(reason)
                console.print(f"{benchmark.name}: skipped: {reason}", highlight=False)
                continue
            except Exception as error:  # noqa: BLE001 - The others are still worth their time.
                failures[benchmark.name] = str(error) or type(error).__name__
                console.print(traceback.format_exc(), markup=False, highlight=False)
                continue
            comparisons += findings.comparisons
            rows += findings.rows
            for comparison in findings.comparisons:
                console.print(comparison_table(comparison), "")
    return Record(
        circumstances=circumstances(sys.argv[1:]),
        effort=effort,
        comparisons=tuple(comparisons),
        rows=tuple(rows),
        skipped=skipped,
        failures=failures,
    )


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
