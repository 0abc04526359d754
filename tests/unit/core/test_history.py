"""The newest points of each split, numbered over both."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from optserve_server.core.history import LossHistory, LossPoint
from optserve_server.core.spec import Split

SPLITS = st.sampled_from([Split.TRAIN, Split.VALIDATION, Split.NONE])


def _add(history: LossHistory, split: Split, loss: float = 0.0) -> None:
    if split is not Split.NONE:
        history.put(
            LossPoint(
                sequence=history.count + 1,
                split=split,
                steps=1,
                epochs=0,
                loss=loss,
                accuracy=None,
                time_s=0.0,
            )
        )


@given(
    splits=st.lists(SPLITS, max_size=30),
    points_max=st.integers(0, 8),
    wanted=SPLITS,
    page_size=st.integers(1, 10),
)
def test_pages_hold_the_newest_points_of_each_split_in_order(
    splits: list[Split], points_max: int, wanted: Split, page_size: int
) -> None:
    history = LossHistory(points_max)
    for loss, split in enumerate(splits):
        _add(history, split, float(loss))
    kept = [(split, float(loss)) for loss, split in enumerate(splits) if split is not Split.NONE]
    numbered = [(sequence, *point) for sequence, point in enumerate(kept, start=1)]
    expected = []
    forgotten = 0
    for split in (Split.TRAIN, Split.VALIDATION) if wanted is Split.NONE else (wanted,):
        mine = [point for point in numbered if point[1] is split]
        expected += mine[max(0, len(mine) - points_max) :]
        forgotten += max(0, len(mine) - points_max)
    came: list[tuple[int, Split, float]] = []
    after, more = 0, True
    while more:
        page = history.page(wanted, after=after, count=page_size)
        assert page.forgotten == forgotten
        assert len(page.points) <= page_size
        came += [(point.sequence, point.split, point.loss) for point in page.points]
        more = page.more
        after = page.points[-1].sequence if page.points else 0
    assert came == sorted(expected)


def test_a_full_page_that_is_the_last_one_says_so() -> None:
    history = LossHistory(10)
    for _ in range(4):
        _add(history, Split.TRAIN)
    assert history.page(Split.TRAIN, after=0, count=2).more
    assert not history.page(Split.TRAIN, after=2, count=2).more
    assert history.page(Split.TRAIN, after=4, count=2).points == []
    assert history.page(Split.TRAIN, after=10**18, count=2).points == []
