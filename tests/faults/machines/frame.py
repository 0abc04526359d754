"""What a breaking machine is: it breaks things many times, and counts what was lost by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sources import ROOT

FAULTY = ROOT / "build" / "soak"
"""Where is kept what something was at fault with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much a machine is to do."""

    count: int
    """How often it breaks something: of what, its ``Machine.unit`` says."""
    seed: int
    """What all its choices come from. Where it counts seeds, the first of them."""
    thorough: bool = True
    """Whether to do also what takes long to set up; the share in ``make test`` does without."""
    advance: Callable[[int], None] = lambda _count: None
    """Told how many have been done since it was last told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a machine has found."""

    tried: int
    """How often it broke something."""
    acknowledged: int | None = None
    """How many steps were acknowledged to clients. None: it is not about steps."""
    lost: int = 0
    """How many of them the sessions did not have in the end."""
    doubled: int = 0
    """How many of them the sessions had twice."""
    notes: tuple[str, ...] = ()
    """What else there is to know: "planted 8, caught 8"."""
    failures: tuple[str, ...] = ()
    """Promises that did not hold, each with what repeats it."""

    @property
    def ok(self) -> bool:
        """Whether every promise has held."""
        return not (self.lost or self.doubled or self.failures)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine that breaks things."""

    name: str
    summary: str
    """What it breaks, in a few words."""
    unit: str
    """What it counts: "kills"."""
    whole_count: int
    """How many of them make up the whole of ``make soak``."""
    whole_s: float
    """How long these take about, on two cores."""
    test_count: int
    """How many of them are a part of ``make test``."""
    run: Callable[[Effort], Report]


def summary_line(machine: Machine, report: Report) -> str:
    """Return what a machine found, in one line."""
    parts = [f"{machine.name:<12} {report.tried:>9,} {machine.unit}"]
    if report.acknowledged is not None:
        parts.append(
            f"{report.acknowledged:,} steps acknowledged, {report.lost} lost,"
            f" {report.doubled} doubled"
        )
    parts += report.notes
    parts.append("ok" if report.ok else "FAILED")
    return "; ".join(parts)
