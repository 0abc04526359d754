"""The picture: the loss of every run over its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from .training import Run

_COLUMNS = 3
_TRAIN_COLOUR, _VALIDATION_COLOUR, _OTHERS_COLOUR = "#1f6fb4", "#d1600a", "#cfcfcf"


def draw(runs: Sequence[Run], path: Path) -> None:
    """Write a PNG with one panel for each run; behind it, in grey, how all the others validate."""
    rows = math.ceil(len(runs) / _COLUMNS)
    figure = Figure(figsize=(12, 1.2 + 2.8 * rows), dpi=110, layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False)
    for number, (run, axes) in enumerate(zip(runs, panels.flat, strict=True)):
        _draw_panel(axes, run, [other for other in runs if other is not run])
        if number % _COLUMNS == 0:
            axes.set_ylabel("loss")
        if number >= len(runs) - _COLUMNS:
            axes.set_xlabel("step")
    figure.suptitle("Handwritten digits: cross entropy over steps", fontsize=14)
    figure.legend(
        *panels.flat[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    figure.savefig(path)


def _draw_panel(axes: Axes, run: Run, others: Sequence[Run]) -> None:
    for other in others:
        (line,) = axes.plot(
            other.validation.steps, other.validation.losses, color=_OTHERS_COLOUR, linewidth=0.8
        )
    line.set_label("validation of the other optimizers")
    train, validation = run.train, run.validation
    axes.plot(train.steps, train.losses, color=_TRAIN_COLOUR, label="train, mean of each epoch")
    axes.plot(validation.steps, validation.losses, color=_VALIDATION_COLOUR, label="validation")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(visible=True, axis="y", color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(run.recipe.name, loc="left", fontweight="bold", fontsize=11)
    axes.set_title(f"{run.validation_accuracy:.1%} right", loc="right", fontsize=10)
    axes.text(
        1, 0.96, run.recipe.schedule, transform=axes.transAxes, ha="right", va="top", fontsize=9
    )
