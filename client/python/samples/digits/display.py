"""What the terminal shows: every run while it trains, and all of them at the end."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from .recipes import RECIPES
from .training import Progress, Run

_REFRESHES_PER_SECOND = 8
_EPOCHS_A_LINE = 5  # Without a terminal: a line for each run and so many epochs.


class Board:
    """One row for each run in a terminal; elsewhere, now and then, a plain line.

    Used as a context manager. Runs in other threads may report to it.
    """

    def __init__(self, console: Console, epochs: int) -> None:
        """Show runs of so many epochs on ``console``."""
        self._console = console
        self._epochs = epochs
        self._progress: dict[str, Progress] = {}
        self._lock = Lock()
        self._live = Live(
            get_renderable=self._table,
            console=console,
            refresh_per_second=_REFRESHES_PER_SECOND,
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def report(self, name: str, progress: Progress) -> None:
        """Show where the run called ``name`` stands."""
        with self._lock:
            self._progress[name] = progress
        due = progress.epoch % _EPOCHS_A_LINE == 0 or progress.epoch == self._epochs
        if due and not self._console.is_terminal:
            self._console.print(
                f"{name:<18} epoch {progress.epoch:>3}/{self._epochs}"
                f"   train loss {progress.train_loss:.4f}"
                f"   validation loss {progress.validation_loss:.4f}"
                f"   accuracy {progress.accuracy:.3f}",
                soft_wrap=True,
                highlight=False,
            )

    def _table(self) -> Table:
        table = _table("optimizer", "epoch", "", "train\nloss", "validation\nloss", "accuracy")
        with self._lock:
            progress = dict(self._progress)
        for recipe in RECIPES:
            at = progress.get(recipe.name)
            numbers = (
                (f"{at.train_loss:.4f}", f"{at.validation_loss:.4f}", f"{at.accuracy:.3f}")
                if at
                else ("", "", "")
            )
            epoch = at.epoch if at else 0
            bar = ProgressBar(total=self._epochs, completed=epoch, width=16)
            table.add_row(recipe.name, f"{epoch}/{self._epochs}", bar, *numbers)
        return table


def results(runs: Sequence[Run]) -> Table:
    """Return the table of what all runs have come to, the most accurate first."""
    table = _table(
        "optimizer", "schedule", "train\nloss", "validation\nloss", "accuracy", "steps/s"
    )
    for run in sorted(runs, key=lambda run: run.validation_accuracy, reverse=True):
        table.add_row(
            run.recipe.name,
            run.recipe.schedule,
            f"{run.train_loss:.4f}",
            f"{run.validation_loss:.4f}",
            f"{run.validation_accuracy:.4f}",
            f"{run.steps_per_second:.0f}",
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        words = column in ("optimizer", "schedule", "")
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    return table
