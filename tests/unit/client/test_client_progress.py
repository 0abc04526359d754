from __future__ import annotations

import io
import sys

import pytest

from optserve_client import progress as progress_module
from optserve_client.progress import TransferProgress, TransferReporter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_callback_is_told_of_the_start_and_of_every_advance() -> None:
    told: list[TransferProgress] = []
    with TransferReporter(told.append).transfer("upload", 10) as advance:
        advance(4)
        advance(6)
    assert [each.done_bytes for each in told] == [0, 4, 10]
    assert {(each.direction, each.total_bytes) for each in told} == {("upload", 10)}


@pytest.mark.parametrize(
    ("progress", "after_s", "shown"),
    [
        pytest.param(True, 0.0, True, id="long"),
        pytest.param(True, 60.0, False, id="short"),
        pytest.param(False, 0.0, False, id="switched-off"),
    ],
)
def test_a_terminal_shows_a_bar_for_what_takes_long(
    progress: bool, after_s: float, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress_module, "_BAR_AFTER_S", after_s)
    with TransferReporter(progress).transfer("download", 1000) as advance:
        advance(400)
        advance(600)
    assert ("download" in terminal.getvalue()) == shown


def test_what_is_no_terminal_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    monkeypatch.setattr(progress_module, "_BAR_AFTER_S", 0.0)
    with TransferReporter(progress=True).transfer("download", 1000) as advance:
        advance(1000)
    assert pipe.getvalue() == ""
