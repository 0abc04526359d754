"""Results for people: tables in the terminal, Markdown for the documents."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.figures import Comparison, Row, Spread, Timing
from benchmarks.record import Record
from rich.table import Table
from rich.text import Text

_STYLES = {"ok": "green", "short": "bold red", "stated": "", "skipped": "yellow"}


def row_line(row: Row, width: int) -> Text:
    """Return the one line of a claim, whose name is padded to ``width``."""
    measured, quartiles = _measured(row)
    spread = f"({quartiles})" if quartiles else ""
    verdict = f"skipped: {row.skipped}" if row.skipped else row.verdict
    line = f"{row.name:<{width}}  {measured:>9}  {_target(row):<14}  {verdict}  {spread}"
    return Text(line.rstrip(), style=_STYLES[row.verdict])


def comparison_table(comparison: Comparison) -> Table:
    """Return one line for each contender."""
    table = Table(title=comparison.title, title_justify="left", box=None, pad_edge=False)
    table.add_column("contender", no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("quartiles", justify="right", no_wrap=True)
    table.add_column("parameters checked", overflow="fold")
    for timing in comparison.timings:
        if timing.skipped:
            table.add_row(timing.contender, "", "", f"skipped: {timing.skipped}", style="yellow")
        else:
            table.add_row(timing.contender, *_times(timing), timing.checked)
    return table


def markdown(record: Record) -> str:
    """Return the record as Markdown: the claims, and everybody's times."""
    parts = (_markdown_head(record), [""], _markdown_rows(record), _markdown_times(record))
    return "\n".join(line for part in parts for line in part)


def _markdown_head(record: Record) -> Iterator[str]:
    at, effort = record.circumstances, record.effort
    versions = ", ".join(f"{name} {version}" for name, version in at.versions.items())
    yield f"Measured on {at.time} at commit {at.commit}: {at.cores} cores of {at.processor},"
    yield f"{at.memory_gib:g} GiB, {at.system}; {versions};"
    yield f"`{at.command}`, {effort.rounds} rounds of {effort.steps} steps."


def _markdown_rows(record: Record) -> Iterator[str]:
    yield "| row | measured | quartiles | target | |"
    yield "|---|--:|--:|--:|---|"
    for row in record.rows:
        verdict = f"skipped: {row.skipped}" if row.skipped else row.verdict
        yield "| " + " | ".join([row.name, *_measured(row), _target(row), verdict]) + " |"
    for row in record.rows:
        if row.note:
            yield ""
            yield f"*{row.name}*: {row.note}."


def _markdown_times(record: Record) -> Iterator[str]:
    for comparison in record.comparisons:
        yield ""
        yield f"### {comparison.title}"
        yield ""
        yield "| contender | step | quartiles |"
        yield "|---|--:|--:|"
        for timing in comparison.timings:
            times = ("", f"skipped: {timing.skipped}") if timing.skipped else _times(timing)
            yield "| " + " | ".join([timing.contender, *times]) + " |"


def _measured(row: Row) -> tuple[str, str]:
    if row.measured is None:
        return "", ""
    spread, unit = row.measured, row.unit
    quartiles = "" if spread.count == 1 else f"{_number(spread.low)} to {_number(spread.high)}"
    return f"{_number(spread.median)} {unit}", quartiles


def _target(row: Row) -> str:
    if row.target is None:
        return ""
    return f"at {row.target.at} {row.target.value:g} {row.target.unit}"


def _times(timing: Timing) -> tuple[str, str]:
    spread: Spread = timing.step_s
    return _milliseconds(spread.median), f"{_bare(spread.low)} to {_milliseconds(spread.high)}"


def _milliseconds(seconds: float) -> str:
    return f"{_bare(seconds)} ms"


def _bare(seconds: float) -> str:
    return _number(1e3 * seconds)


def _number(value: float) -> str:
    """Three digits, as far as there are so many before the point or behind it."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
