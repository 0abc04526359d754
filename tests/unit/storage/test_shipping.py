"""The thread that keeps an archive: it goes on, whatever goes wrong."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest
from faults.disks import MemoryDisk
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem
from unit.storage.archives import Store, came_back, trained
from unit.storage.sessions import restored, stored

from optserve_server.storage.archive import ArchiveError, Mirror, Shipping
from optserve_server.storage.remote import RemoteStore


@dataclass(slots=True)
class Told:
    """What a watcher was told."""

    shipped: int = 0
    failed: int = 0

    def archive_shipped(self) -> None:
        self.shipped += 1

    def archive_failed(self) -> None:
        self.failed += 1


def test_shipping_goes_on_after_trouble_and_ends_with_everything_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk, archive = MemoryDisk(), Store()
    trained(disk)
    archive.writes_left = 3
    told = Told()
    shipping = Shipping(Mirror(disk, archive), told, interval_s=3600.0)
    while not told.failed:
        time.sleep(0.01)
    archive.writes_left = 1 << 30
    shipping.close()
    assert told == Told(shipped=1, failed=1)
    assert "the archive is behind: connection reset by peer" in caplog.text
    assert restored(came_back(archive))[0] == 5


class MoodyStore(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types.
    """A store whose library raises what it likes, as those of the clouds do."""

    protocol = "moody"
    answers = False

    def _open(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 fsspec's own.
        if not self.answers:
            raise RuntimeError("unable to locate credentials")
        return super()._open(*arguments, **options)


def test_shipping_goes_on_after_errors_of_any_class(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_implementation("moody", MoodyStore, clobber=True)
    disk, archive = MemoryDisk(), RemoteStore("moody://archive")
    trained(disk)
    told = Told()
    shipping = Shipping(Mirror(disk, archive), told, interval_s=0.01)
    deadline_s = time.monotonic() + 10
    while told.failed < 2 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not told.shipped
    monkeypatch.setattr(MoodyStore, "answers", True)
    while len(archive.sizes()) < 10 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert len(archive.sizes()) >= 10  # In the same thread, and not at the end.
    shipping.close()
    MemoryFileSystem.store.clear()
    assert "archive/version.json: RuntimeError: unable to locate credentials" in caplog.text


@pytest.mark.parametrize("url", ["nowhere://bucket", "lakefs://bucket/prefix"])
def test_archive_that_nothing_can_open_says_why(url: str) -> None:
    with pytest.raises(ArchiveError, match=f"^{url}: "):
        RemoteStore(url)


def test_shipping_into_the_archive_of_another_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    archive = Store()
    ours, theirs = MemoryDisk(), MemoryDisk()
    trained(ours)
    Mirror(ours, archive).ship()
    stored(theirs).close()
    told = Told()
    Shipping(Mirror(theirs, archive), told, interval_s=3600.0).close()
    assert told.failed
    assert not told.shipped
    assert "nothing is archived: the archive is of another data directory" in caplog.text
