"""How far a long transfer of parameters is.

By default a transfer that takes more than a second shows a bar, if standard error is a terminal and
``rich`` is installed. Steps show none: a training loop has a display of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_BAR_AFTER_S = 1.0  # What is over sooner would only flicker.


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferProgress:
    """Where a transfer stands."""

    direction: Literal["upload", "download"]
    """As the client sees it."""
    done_bytes: int
    """How much has been handed to the network, or has come."""
    total_bytes: int
    """How much there is."""


ProgressCallback: TypeAlias = Callable[[TransferProgress], None]
"""Called at the start and after every message, perhaps from another thread. Must not raise."""

Advance: TypeAlias = Callable[[int], None]
"""Told how many bytes more are done."""


class TransferReporter:
    """Tells about transfers: with a bar, to a callback, or not at all."""

    def __init__(self, progress: bool | ProgressCallback) -> None:
        """Report as ``connect(progress=...)`` says."""
        self._progress = progress

    @contextmanager
    def transfer(
        self, direction: Literal["upload", "download"], total_bytes: int
    ) -> Iterator[Advance]:
        """Report one transfer while the block runs; the block says how much more is done."""
        bar = _Bar() if self._progress is True and sys.stderr.isatty() else None
        report = bar.show if bar else self._progress if callable(self._progress) else None
        done_bytes = 0

        def advance(count: int) -> None:
            nonlocal done_bytes
            done_bytes += count
            if report:
                report(
                    TransferProgress(
                        direction=direction, done_bytes=done_bytes, total_bytes=total_bytes
                    )
                )

        try:
            advance(0)
            yield advance
        finally:
            if bar:
                bar.close()


class _Bar:
    """A bar on standard error, once the transfer proves long; nothing without ``rich``."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def show(self, progress: TransferProgress) -> None:
        if self._bar is None:
            if time.monotonic() - self._started < _BAR_AFTER_S:
                return
            self._bar = _rich_bar()
            if self._bar is None:
                self._started = float("inf")  # Without rich: never ask again.
                return
            self._bar.start()
        if self._task is None:
            self._task = self._bar.add_task(progress.direction, total=progress.total_bytes)
        self._bar.update(self._task, completed=progress.done_bytes)

    def close(self) -> None:
        # After an interrupt the network's thread may still report once: it must not start the bar
        # again.
        bar, self._bar, self._started = self._bar, None, float("inf")
        if bar is not None:
            bar.stop()


def _rich_bar() -> Progress | None:
    try:
        from rich.console import Console  # noqa: PLC0415  (An extra, and slow to import.)
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TransferSpeedColumn,
        )
    except ImportError:
        return None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)
