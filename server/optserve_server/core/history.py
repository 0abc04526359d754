"""A session's loss history: bounded, and told how much of it is gone."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from optserve_server.core.spec import Split

POINT_BYTES = 1280  # Itself 0.3 KiB; as JSON, while a snapshot is written or read, up to 0.9.
_SPLITS = (Split.TRAIN, Split.VALIDATION)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPoint:
    """One evaluation."""

    sequence: int
    """Number of the point in its session, from 1, over both splits."""
    split: Split
    steps: int
    epochs: int
    loss: float
    accuracy: float | None
    time_s: float
    """When, in seconds since the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPage:
    """A piece of a history."""

    points: Sequence[LossPoint]
    forgotten: int
    """How many older points, of the splits asked for, are no longer kept."""
    more: bool
    """Whether points follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryState:
    """All of a history."""

    counts: Mapping[Split, int]
    """How many points of each split there have been."""
    points: Sequence[LossPoint]
    """Those that are kept, in order."""


class LossHistory:
    """The newest points of each split."""

    def __init__(self, points_max: int) -> None:
        """Keep at most ``points_max`` points of each split."""
        self._points: dict[Split, deque[LossPoint]] = {
            split: deque(maxlen=points_max) for split in _SPLITS
        }
        self._counts = dict.fromkeys(_SPLITS, 0)

    def put(self, point: LossPoint) -> None:
        """Keep a point, whose number is the next one."""
        self._counts[point.split] += 1
        self._points[point.split].append(point)

    @property
    def count(self) -> int:
        """How many points there have been."""
        return sum(self._counts.values())

    @property
    def byte_count(self) -> int:
        """How much memory its points take."""
        return POINT_BYTES * sum(len(points) for points in self._points.values())

    def growth(self, split: Split) -> int:
        """Return how much more memory it takes with one point more."""
        points = self._points[split]
        return 0 if len(points) == points.maxlen else POINT_BYTES

    def capture(self) -> HistoryState:
        """Return a copy of everything."""
        kept = [point for split in _SPLITS for point in self._points[split]]
        kept.sort(key=lambda point: point.sequence)
        return HistoryState(counts=dict(self._counts), points=kept)

    def restore(self, state: HistoryState) -> None:
        """Become the history that ``state`` was taken from."""
        for point in state.points:
            self._points[point.split].append(point)
        self._counts |= state.counts

    def page(self, split: Split, *, after: int, count: int) -> LossPage:
        """Return up to ``count`` points with numbers above ``after``, in order.

        NONE means both splits.
        """
        splits = _SPLITS if split is Split.NONE else (split,)
        kept = [point for each in splits for point in self._points[each] if point.sequence > after]
        kept.sort(key=lambda point: point.sequence)
        return LossPage(
            points=list(islice(kept, count)),
            forgotten=sum(self._counts[each] - len(self._points[each]) for each in splits),
            more=len(kept) > count,
        )
