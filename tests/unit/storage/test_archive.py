"""An archive in an object store: what it holds is whole, and a data directory comes of it."""

from __future__ import annotations

import errno
import stat
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.disks import CrashError, MemoryDisk
from fsspec.implementations.memory import MemoryFileSystem
from unit.storage.archives import KEY, Store, came_back, trained
from unit.storage.sessions import (
    ORIGIN,
    SESSION,
    append,
    assert_same_snapshot,
    begun,
    commit,
    facts_of,
    load,
    restored,
    snapshot_of,
    stored,
)

from optserve_server.storage.archive import (
    ArchiveError,
    ForeignArchiveError,
    Mirror,
    restore_if_empty,
)
from optserve_server.storage.disk import LocalDisk
from optserve_server.storage.local import LocalStorage
from optserve_server.storage.remote import RemoteStore


@pytest.fixture(params=["memory", "file"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RemoteStore]:
    MemoryFileSystem.store.clear()  # It is one for the whole process.
    yield RemoteStore(
        {"memory": "memory://archive/optserve", "file": f"file://{tmp_path}/a"}[request.param]
    )
    MemoryFileSystem.store.clear()


def test_data_directory_comes_back_from_an_object_store(archive: RemoteStore) -> None:
    disk = MemoryDisk()
    trained(disk)
    first = Mirror(disk, archive).ship()
    assert first.is_complete
    assert first.sent_bytes > 10_000
    assert Mirror(disk, archive).ship().sent_bytes == 0  # It is all there.

    copy = MemoryDisk()
    assert restore_if_empty(archive, copy) == first.sent_bytes
    for session_id in (SESSION, "07e5"):
        snapshot, last = restored(copy, session_id)
        assert snapshot == 5
        assert 5 < last < 12  # The last segment may still have grown.
        copy.restart()
    storage = stored(copy)
    assert [session.facts for session in storage.sessions()] == [
        facts_of(SESSION),
        facts_of("07e5"),
    ]
    checkpoint, snapshot_ = storage.load_checkpoint(KEY)
    assert checkpoint.facts == {"steps": 3}
    assert_same_snapshot(snapshot_, snapshot_of(3))
    store = storage.open(SESSION)
    _, last = load(store)
    append(store, 1)
    commit(store)
    store.close()
    storage.close()
    assert restored(copy) == (5, last + 1)
    Mirror(copy, archive).ship()  # It goes on with the same archive.


def test_archive_follows_what_is_pruned_changed_and_deleted() -> None:
    disk, archive = MemoryDisk(), Store()
    trained(disk)
    mirror = Mirror(disk, archive)
    mirror.ship()
    storage = stored(disk)
    storage.delete("07e5")
    storage.delete_checkpoint(KEY)
    storage.save_checkpoint(KEY, {"steps": 4}, snapshot_of(4))  # The same name, and the same size.
    store = storage.open(SESSION)
    load(store)
    store.update_facts({**facts_of(SESSION), "name": "SESSION 5e55"})
    store.save_snapshot(snapshot_of(12))
    append(store, 1)
    store.save_snapshot(snapshot_of(13))
    store.close()
    assert mirror.ship().removed > 5
    copy = MemoryDisk()
    restore_if_empty(archive, copy)
    assert restored(copy) == (13, 13)
    copy.restart()
    restored_storage = stored(copy)
    assert [session.facts["name"] for session in restored_storage.sessions()] == ["SESSION 5e55"]
    assert_same_snapshot(restored_storage.load_checkpoint(KEY)[1], snapshot_of(4))
    assert not [name for name in archive.objects if "07e5" in name]


def test_pass_that_ends_anywhere_leaves_what_can_be_restored_and_is_made_up_for() -> None:
    for writes in range(30):
        disk, archive = MemoryDisk(), Store()
        trained(disk)
        archive.writes_left = writes
        try:
            Mirror(disk, archive).ship()
            was_whole = True
        except ArchiveError:
            was_whole = False
        if writes:
            storage = stored(came_back(archive))
            for session in storage.sessions():
                assert load(storage.open(session.session_id))[1] >= 0
            storage.close()
        archive.writes_left = 1 << 30
        assert Mirror(disk, archive).ship().is_complete
        assert restored(came_back(archive))[0] == 5
        if was_whole:
            return
    pytest.fail("a pass takes more writes than these")


def test_snapshot_that_is_pruned_under_a_pass_makes_it_incomplete() -> None:
    disk, archive = MemoryDisk(), Store()
    trained(disk)
    storage = stored(disk, segment_bytes_max=2500)
    store = storage.open(SESSION)
    load(store)

    def prune(operation: str) -> None:
        if operation.startswith(f"open sessions/{SESSION}/journal"):
            disk.before = lambda _: None
            for last in (12, 13):
                append(store, last - store.sequence)
                store.save_snapshot(snapshot_of(last))

    disk.before = prune
    mirror = Mirror(disk, archive)
    assert not mirror.ship().is_complete
    assert restored(came_back(archive)) == (5, 5)
    assert mirror.ship().is_complete
    assert restored(came_back(archive)) == (13, 13)


@pytest.mark.parametrize("name", ["head.json", f"snapshot-{5:020d}/manifest.json"])
def test_damage_is_not_archived_in_the_place_of_what_was_whole(name: str) -> None:
    disk, archive = MemoryDisk(), Store()
    trained(disk)
    Mirror(disk, archive).ship()
    before = dict(archive.objects)
    disk.damage(f"sessions/{SESSION}/{name}", 60)
    storage = stored(disk)
    begun(storage, "11").close()
    Mirror(disk, archive).ship()
    assert archive.objects.items() >= before.items()
    assert "sessions/11/head.json" in archive.objects


def test_session_that_cannot_be_read_keeps_no_other_from_being_archived(
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk, archive = MemoryDisk(), Store()
    trained(disk)
    mirror = Mirror(disk, archive)
    mirror.ship()
    before = dict(archive.objects)
    storage = stored(disk)
    begun(storage, "11").close()

    def fail(operation: str) -> None:
        if operation.startswith(f"open sessions/{SESSION}/"):
            raise OSError(errno.EIO, "the disk is broken")

    disk.before = fail
    disk.make_directory("sessions/lost+found")
    disk.create("sessions/notes").close()
    mirror.ship()
    assert archive.objects.items() >= before.items()
    assert "sessions/11/head.json" in archive.objects
    assert f"not archived: sessions/{SESSION}/snapshot-" in caplog.text
    assert caplog.text.count("not archived") == 1


@pytest.mark.parametrize("place", ["data", "."])
def test_data_directory_is_not_taken_for_its_own_archive(tmp_path: Path, place: str) -> None:
    disk = LocalDisk(tmp_path / "data")
    storage = LocalStorage(disk, ORIGIN)
    store = begun(storage)
    append(store, 3)
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        with pytest.raises(ForeignArchiveError, match="lock: a data directory is in the place"):
            Mirror(disk, RemoteStore(f"file://{tmp_path / place}")).ship()
    assert sorted(tmp_path.rglob("*")) == before
    store.close()
    storage.close()


def test_archive_of_another_data_directory_is_left_alone() -> None:
    archive = Store()
    ours, theirs = MemoryDisk(), MemoryDisk()
    trained(ours)
    Mirror(ours, archive).ship()
    before = dict(archive.objects)
    stored(theirs).close()
    with pytest.raises(ForeignArchiveError, match="another data directory"):
        Mirror(theirs, archive).ship()
    assert archive.objects == before
    other = Store()
    other.objects["holiday.jpg"] = b"\xff"
    with pytest.raises(ForeignArchiveError):
        Mirror(ours, other).ship()
    with pytest.raises(ForeignArchiveError):
        restore_if_empty(other, MemoryDisk())


def test_memory_of_an_archive_does_not_grow_with_what_is_in_it(tmp_path: Path) -> None:
    disk = LocalDisk(tmp_path / "data")
    storage = LocalStorage(disk, ORIGIN)
    history = list(range(100_000))  # Some megabyte of JSON.
    for session_id in ("11", "12", "13"):
        storage.create(session_id, {"history": history}, snapshot_of(0)).close()
    place = RemoteStore(f"file://{tmp_path}/archive")
    mirrors = [Mirror(disk, place), Mirror(disk, place)]
    tracemalloc.start()
    try:
        for mirror in mirrors:  # One that has sent it, and one that finds it there.
            mirror.ship()
        held_bytes, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held_bytes < 1 << 20 < most_bytes
    storage.close()


def test_archive_that_was_restored_is_no_longer_that_of_the_directory_it_is_from() -> None:
    disk, archive, copy = MemoryDisk(), Store(), MemoryDisk()
    trained(disk)
    old = Mirror(disk, archive)
    old.ship()
    restore_if_empty(archive, copy)
    storage = stored(copy)
    begun(storage, "11").close()
    Mirror(copy, archive).ship()
    before = dict(archive.objects)
    assert "sessions/11/head.json" in before
    for mirror in (old, Mirror(disk, archive)):  # One that was at work meanwhile, and a new one.
        with pytest.raises(ForeignArchiveError, match="another data directory"):
            mirror.ship()
    assert archive.objects == before


def test_archive_on_a_mounted_directory_is_the_servers_users_alone(tmp_path: Path) -> None:
    disk, place = MemoryDisk(), tmp_path / "mnt" / "archive"
    trained(disk)
    Mirror(disk, RemoteStore(f"file://{place}")).ship()
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_file_system_of_its_own_is_restored_into() -> None:
    disk, archive, fresh = MemoryDisk(), Store(), MemoryDisk()
    trained(disk)
    sent = Mirror(disk, archive).ship().sent_bytes
    fresh.make_directory("lost+found")
    assert restore_if_empty(archive, fresh) == sent
    assert restored(fresh)[0] == 5
    assert "lost+found" in {entry.name for entry in fresh.entries("")}


def test_directory_with_sessions_is_not_restored_over() -> None:
    disk, archive = MemoryDisk(), Store()
    trained(disk)
    assert restore_if_empty(archive, MemoryDisk()) == 0  # As at the first start of all.
    Mirror(disk, archive).ship()
    storage = stored(disk)
    store = storage.open(SESSION)
    load(store)
    append(store, 1)
    store.close()
    storage.close()
    assert restore_if_empty(archive, disk) == 0
    assert restored(disk) == (5, 13)


def test_restore_that_was_interrupted_begins_anew() -> None:
    disk, archive = MemoryDisk(), Store()
    trained(disk)
    Mirror(disk, archive).ship()
    whole = MemoryDisk()
    restore_if_empty(archive, whole)
    for position in range(1, len(whole.operations), 5):
        copy = MemoryDisk()
        left = iter(range(position))

        def stop(_: str, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise CrashError

        copy.before = stop
        with pytest.raises(CrashError):
            restore_if_empty(archive, copy)
        copy.lose_power()
        restore_if_empty(archive, copy)
        assert restored(copy)[0] == 5
