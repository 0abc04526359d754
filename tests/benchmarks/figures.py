"""What is found: times, ratios, rows and their verdicts; all of it can be written as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Verdict: TypeAlias = Literal["ok", "short", "stated", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The median of several measurements, and the quartiles around it."""

    median: float
    low: float
    """A quarter of the measurements is below it."""
    high: float
    """A quarter of the measurements is above it."""
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        if len(values) == 1:
            return cls(median=values[0], low=values[0], high=values[0], count=1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=median, low=low, high=high, count=len(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What one contender took."""

    contender: str
    parameters: int
    tensors: int
    rounds_s: tuple[tuple[float, ...], ...] = ()
    """Seconds of every step, by round."""
    checked: str = ""
    """What the parameters were found to be at the end."""
    skipped: str = ""
    """Why there are no times."""

    @property
    def step_s(self) -> Spread:
        """Seconds of a step, over all rounds."""
        return Spread.of([seconds for each in self.rounds_s for seconds in each])


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Contenders that did the same work in the same run, in turn."""

    name: str
    title: str
    optimizer: str
    timings: tuple[Timing, ...]

    def ratio(self, numerator: str, denominator: str) -> Spread:
        """Return how the two relate: for each round, of the median steps.

        Raises:
            NotMeasuredError: One of them was skipped.
        """
        above, below = self._medians(numerator), self._medians(denominator)
        return Spread.of([a / b for a, b in zip(above, below, strict=True)])

    def relative_to(self, numerator: str, seconds: float) -> Spread:
        """Return how a contender's steps relate to a time that was calculated.

        Raises:
            NotMeasuredError: It was skipped.
        """
        return Spread.of([each / seconds for each in self._medians(numerator)])

    def timing(self, contender: str) -> Timing:
        """Return what this contender took, or why it took nothing."""
        return next(each for each in self.timings if each.contender == contender)

    def _medians(self, contender: str) -> list[float]:
        timing = self.timing(contender)
        if timing.skipped:
            raise NotMeasuredError(f"{contender}: {timing.skipped}")
        return [statistics.median(each) for each in timing.rounds_s]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a row is held to."""

    value: float
    at: Literal["most", "least"]
    unit: str
    """Of the value."""

    def met_by(self, measured: float) -> bool:
        """Say whether it is met."""
        return measured <= self.value if self.at == "most" else measured >= self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One claim, and what was measured of it."""

    name: str
    unit: str
    """Behind the number: "x", "%", "KiB"."""
    target: Target | None = None
    """None: the number is stated, and held to nothing."""
    measured: Spread | None = None
    skipped: str = ""
    """Why nothing was measured."""
    note: str = ""
    """What else one needs to know to read the number."""

    @property
    def verdict(self) -> Verdict:
        """Say what became of the claim."""
        if self.measured is None:
            return "skipped"
        if self.target is None:
            return "stated"
        return "ok" if self.target.met_by(self.measured.median) else "short"


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What one benchmark has found."""

    comparisons: tuple[Comparison, ...] = ()
    rows: tuple[Row, ...] = ()


class NotMeasuredError(Exception):
    """A contender that is needed was skipped; the message says which, and why."""


def at_most(value: float, unit: str = "x") -> Target:
    """Return the target of a number that must not be larger."""
    return Target(value=value, at="most", unit=unit)


def at_least(value: float, unit: str = "x") -> Target:
    """Return the target of a number that must not be smaller."""
    return Target(value=value, at="least", unit=unit)


def row(name: str, target: Target, measure: Callable[[], Spread], note: str = "") -> Row:
    """Return the row that ``measure`` finds; a skipped one, if somebody was skipped."""
    try:
        return Row(name=name, unit=target.unit, target=target, measured=measure(), note=note)
    except NotMeasuredError as reason:
        return Row(name=name, unit=target.unit, target=target, skipped=str(reason))


def stated(name: str, unit: str, measured: Spread, note: str = "") -> Row:
    """Return the row of a number that is held to nothing: what something costs."""
    return Row(name=name, unit=unit, measured=measured, note=note)
