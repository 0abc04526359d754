"""What all benchmarks of one run share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.arena import Effort, Report
from benchmarks.figures import Findings


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """How much is measured, and who hears of it."""

    effort: Effort
    thorough: bool
    """Whether also to measure what no row asks for."""
    threads: int
    """How many cores torch uses, in every process that steps."""
    report: Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Something to measure."""

    name: str
    summary: str
    run: Callable[[Conditions], Findings]
    thorough_only: bool = False
    """Whether no claim needs it, so that a quick check leaves it out."""
