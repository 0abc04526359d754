"""The thread that keeps an archive: it goes on, whatever goes wrong."""

from __future__ import annotations

import time
from typing import Any

import pytest
from faults.disks import MemoryDisk
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem
from unit.storage.archives import Store, came_back, trained
from unit.storage.sessions import restored, stored

from optserve_server.storage.archive import ArchiveError, Mirror, Shipping
from optserve_server.storage.remote import RemoteStore


def test_shipping_goes_on_after_trouble_and_ends_with_everything_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk, archive = MemoryDisk(), Store()
    trained(disk)
    archive.writes_left = 3
    shipping = Shipping(Mirror(disk, archive), interval_s=3600.0)
    while "behind" not in caplog.text:
        time.sleep(0.01)
    archive.writes_left = 1 << 30
    shipping.close()
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
    shipping = Shipping(Mirror(disk, archive), interval_s=0.01)
    deadline_s = time.monotonic() + 10
    while caplog.text.count("behind") < 2 and time.monotonic() < deadline_s:
        time.sleep(0.01)
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
    Shipping(Mirror(theirs, archive), interval_s=3600.0).close()
    assert "nothing is archived: the archive is of another data directory" in caplog.text
