"""The results that the documents show: a committed record, a table and a picture of it."""

from __future__ import annotations

from pathlib import Path

from benchmarks import plot
from benchmarks.job import TESTS
from benchmarks.record import Record
from benchmarks.report import markdown

PUBLISHED = Path(__file__).parent / "results" / "published.json"
DOCUMENT = TESTS.parent / "server" / "docs" / "performance.md"
PICTURE = DOCUMENT.with_name("performance.svg")

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def publish(record: Record) -> None:
    """Make ``record`` the one that the documents show."""
    record.write(PUBLISHED)
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(with_results(text, record), encoding="utf-8")
    plot.draw(record, PICTURE)


def with_results(text: str, record: Record) -> str:
    """Return the document with the record between its markers.

    Raises:
        ValueError: It has no markers.
    """
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"the document must have {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{markdown(record)}\n\n{END}{after}"
