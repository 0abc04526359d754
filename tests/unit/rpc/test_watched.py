"""Files that change are read again, once they make sense."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from optserve_server.rpc import watched
from optserve_server.rpc.watched import UnusableFileError, Watched


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "LOOK_INTERVAL_S", 0.0)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "a", tmp_path / "b"
    for path in paths:
        path.write_text("1")
    return paths


def _equal(contents: tuple[bytes, ...]) -> bytes:
    """Make sense of files that say the same."""
    first, second = contents
    if first != second:
        raise UnusableFileError(f"{first!r} does not fit {second!r}")
    return first


def test_a_pair_is_kept_until_both_have_changed(
    pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    files = Watched(pair, _equal)
    pair[0].write_text("2")
    assert [files.current() for _ in range(3)] == [b"1"] * 3
    assert [record.levelno for record in caplog.records] == [logging.WARNING]  # Once.
    pair[1].write_text("2")
    assert files.current() == b"2"


def test_a_file_that_goes_leaves_what_it_said(pair: tuple[Path, Path]) -> None:
    files = Watched(pair, _equal)
    pair[0].unlink()
    assert files.current() == b"1"


def test_the_same_trouble_is_told_again_when_it_has_been_away(
    pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    files = Watched(pair, _equal)
    for content in ("2", "1", "2"):
        pair[0].write_text(content)
        files.current()
    assert len(caplog.records) == 2


def test_a_change_that_leaves_size_and_time_as_they_were_is_seen(pair: tuple[Path, Path]) -> None:
    files = Watched(pair, _equal)
    before = pair[0].stat()
    for path in pair:
        path.write_text("2")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files.current() == b"2"


def test_what_changes_while_it_is_made_sense_of_is_not_taken(pair: tuple[Path, Path]) -> None:
    writing: Iterator[str] = iter(["", "3"])  # At the second reading it is being written.

    def parse(contents: tuple[bytes, ...]) -> bytes:
        if content := next(writing, ""):
            for path in pair:
                path.write_text(content)
        return _equal(contents)

    files = Watched(pair, parse)
    for path in pair:
        path.write_text("2")
    assert files.current() == b"1"
    assert files.current() == b"3"


def test_any_thread_may_ask(pair: tuple[Path, Path]) -> None:
    files = Watched(pair, _equal)
    with ThreadPoolExecutor(4) as executor:
        seen = [executor.submit(files.current) for _ in range(100)]
        for path in pair:
            path.write_text("2")
        assert {each.result() for each in seen} <= {b"1", b"2"}
    assert files.current() == b"2"
