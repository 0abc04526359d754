"""The picture: a step of everybody, by size and over each network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # Before pyplot looks for a screen.

import matplotlib.pyplot as plt
from benchmarks.figures import Comparison
from benchmarks.record import Record
from matplotlib.axes import Axes

_OURS, _PEER = "#0b6e99", "#b8b8b8"


def draw(record: Record, path: Path) -> None:
    """Write the picture of a record, in the format that the file's name ends in."""
    grown = [each for each in record.comparisons if each.name.startswith("size-")]
    bars = [each for each in record.comparisons if each not in grown and each.name != "growth"]
    panels = len(bars) + bool(grown)
    # The same record makes the same file: its date and its ids would differ.
    with mpl.rc_context({"svg.hashsalt": "optserve", "svg.fonttype": "none"}):
        figure, axes = plt.subplots(
            panels, figsize=(9, 3.2 * panels), layout="constrained", squeeze=False
        )
        for axis, comparison in zip(axes[:, 0], bars, strict=False):
            _draw_bars(axis, comparison)
        if grown:
            _draw_sizes(axes[-1, 0], grown)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def _draw_bars(axis: Axes, comparison: Comparison) -> None:
    timings = [timing for timing in reversed(comparison.timings) if not timing.skipped]
    spreads = [timing.step_s for timing in timings]
    medians = [1e3 * spread.median for spread in spreads]
    below = [1e3 * (spread.median - spread.low) for spread in spreads]
    above = [1e3 * (spread.high - spread.median) for spread in spreads]
    names = [timing.contender for timing in timings]
    colours = [_OURS if name.startswith("optserve") else _PEER for name in names]
    axis.barh(names, medians, xerr=[below, above], color=colours, ecolor="#404040")
    axis.set_title(comparison.title, loc="left", fontsize=10)
    axis.set_xlabel("milliseconds for a step: median and quartiles")
    axis.spines[["top", "right"]].set_visible(False)


def _draw_sizes(axis: Axes, grown: Sequence[Comparison]) -> None:
    names = dict.fromkeys(timing.contender for each in grown for timing in each.timings)
    for name in names:
        timings = [timing for each in grown for timing in each.timings if timing.contender == name]
        measured = [timing for timing in timings if not timing.skipped]
        axis.plot(
            [timing.parameters for timing in measured],
            [1e3 * timing.step_s.median for timing in measured],
            label=name,
            marker="o",
            markersize=3,
            linewidth=2.5 if name.startswith("optserve") else 1,
        )
    axis.set(xscale="log", yscale="log", xlabel="parameters", ylabel="milliseconds for a step")
    axis.set_title("As models grow: loopback, SGD with momentum", loc="left", fontsize=10)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
