"""What is there: sessions, checkpoints and the files that they are made of."""

from __future__ import annotations

import dataclasses

import pytest
from faults.disks import MemoryDisk
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

from optserve_server.core.storage import (
    CheckpointKey,
    DamagedError,
    Origin,
    StorageBusyError,
    StorageVersionError,
)
from optserve_server.storage.document import encode_document
from optserve_server.storage.local import LocalStorage

DIRECTORY = f"sessions/{SESSION}"


def files(disk: MemoryDisk, directory: str = DIRECTORY) -> list[str]:
    """Return what stands in a directory."""
    return sorted(entry.name for entry in disk.entries(directory))


def test_sessions_are_listed_in_the_order_of_their_creation() -> None:
    disk = MemoryDisk()
    storage = stored(disk)
    for name in ("b", "a", "c"):
        begun(storage, name).close()
    storage.delete("a")
    storage.close()
    storage = stored(disk)
    begun(storage, "0").close()
    sessions = storage.sessions()
    assert [session.session_id for session in sessions] == ["b", "c", "0"]
    assert [session.facts for session in sessions] == [facts_of(name) for name in ("b", "c", "0")]
    assert all(session.bytes_on_disk > 400 for session in sessions)


def test_facts_that_were_updated_are_listed() -> None:
    disk = MemoryDisk()
    storage = stored(disk)
    store = begun(storage)
    store.update_facts({"name": "new"})
    store.update_facts({"name": "newer"})
    disk.lose_power()
    (session,) = stored(disk).sessions()
    assert session.facts == {"name": "newer"}


def test_checkpoint_outlives_its_session_and_is_its_tenants() -> None:
    disk = MemoryDisk()
    storage = stored(disk)
    begun(storage).close()
    names = ["best", "../../etc/passwd", "ä\0b", "", "x" * 10_000]
    for number, name in enumerate(names):
        key = CheckpointKey(tenant="ours", session_id=SESSION, name=name)
        saved = storage.save_checkpoint(key, {"steps": number}, snapshot_of(number))
        assert saved.key == key
        assert saved.origin == ORIGIN
    theirs = CheckpointKey(tenant="theirs", session_id="07e5", name="best")
    storage.save_checkpoint(theirs, {}, snapshot_of(7))
    storage.delete(SESSION)
    disk.lose_power()

    storage = stored(disk)
    ours = storage.checkpoints("ours")
    assert [checkpoint.key.name for checkpoint in ours] == names
    assert storage.checkpoints("ours", SESSION) == ours
    assert storage.checkpoints("ours", "07e5") == []
    assert [checkpoint.key for checkpoint in storage.checkpoints("theirs")] == [theirs]
    for number, checkpoint in enumerate(ours):
        assert checkpoint.facts == {"steps": number}
        again, snapshot = storage.load_checkpoint(checkpoint.key)
        assert again == checkpoint
        assert_same_snapshot(snapshot, snapshot_of(number))
    storage.delete_checkpoint(ours[0].key)
    assert storage.checkpoints("ours") == ours[1:]
    assert {entry.name for entry in disk.entries("")} == {"checkpoints", "sessions", "version.json"}


def test_two_snapshots_and_the_journal_between_them_are_kept() -> None:
    disk = MemoryDisk()
    storage = stored(disk)
    store = begun(storage)
    for last in (2, 4, 6):
        append(store, 2)
        store.save_snapshot(snapshot_of(last))
        commit(store)
    assert files(disk) == [
        "head.json",
        f"journal-{5:020d}.log",
        f"snapshot-{4:020d}",
        f"snapshot-{6:020d}",
    ]
    assert store.journal_bytes == len(disk.read(f"{DIRECTORY}/journal-{5:020d}.log"))
    (session,) = storage.sessions()
    assert (
        session.bytes_on_disk
        == store.kept_bytes + store.journal_bytes
        == disk.used_bytes - _version_bytes(disk)
    )


def _version_bytes(disk: MemoryDisk) -> int:
    return len(disk.read("version.json"))


def test_journal_goes_on_in_another_file_when_one_is_full() -> None:
    disk = MemoryDisk()
    storage = stored(disk, segment_bytes_max=2500)
    store = begun(storage)
    append(store, 12)
    store.close()
    segments = [name for name in files(disk) if name.startswith("journal-")]
    assert len(segments) > 3
    assert all(len(disk.read(f"{DIRECTORY}/{name}")) <= 2500 for name in segments)
    storage.close()
    assert restored(disk) == (0, 12)


def test_session_without_a_journal_goes_on_behind_its_snapshot() -> None:
    disk = MemoryDisk()
    store = begun(stored(disk))
    for sequence in (50, 100, 150):
        store.save_snapshot(snapshot_of(sequence))
        assert (store.sequence, store.durable_sequence) == (sequence, sequence)
    store.save_snapshot(snapshot_of(150))  # Once more, for a drain: it is there already.
    assert files(disk) == ["head.json", f"snapshot-{100:020d}", f"snapshot-{150:020d}"]
    append(store, 2)  # From here on it has one.
    store.close()
    disk.restart()
    assert restored(disk) == (150, 152)


def test_snapshot_of_a_moment_that_the_journal_has_passed_keeps_what_came_after() -> None:
    disk = MemoryDisk()
    store = begun(stored(disk))
    append(store, 9)
    store.save_snapshot(snapshot_of(4))
    append(store, 1)
    store.save_snapshot(snapshot_of(7))
    append(store, 1)
    store.close()
    disk.restart()
    assert restored(disk) == (7, 11)


def test_origins_are_those_of_the_records_that_are_left() -> None:
    disk = MemoryDisk()
    newer = dataclasses.replace(ORIGIN, torch="3.0.0")
    storage = stored(disk)
    store = begun(storage)
    append(store, 2)
    store.close()
    storage.close()
    assert _origins_of_next(disk, newer) == {ORIGIN}
    assert _origins_of_next(disk, newer) == {ORIGIN, newer}
    assert _origins_of_next(disk, newer, save=True) == {ORIGIN, newer}
    # What the snapshot contains need not be calculated again, and may be anybody's.
    assert _origins_of_next(disk, ORIGIN) == set()
    assert _origins_of_next(disk, ORIGIN) == {ORIGIN}


def _origins_of_next(disk: MemoryDisk, origin: Origin, *, save: bool = False) -> frozenset[Origin]:
    """Return whose records a server finds that starts now; it goes on with one."""
    storage = LocalStorage(disk, origin, threaded=False)
    store = storage.open(SESSION)
    loaded = store.load()
    for _ in loaded.records:
        pass
    append(store, 1)
    if save:
        store.save_snapshot(snapshot_of(store.sequence))
    store.close()
    storage.close()
    return loaded.origins


def test_load_may_leave_half_a_directory_behind_that_is_removed() -> None:
    disk = MemoryDisk()
    begun(stored(disk)).close()
    for left in (f"{DIRECTORY}/snapshot-{9:020d}.tmp", "sessions/ab.tmp", "sessions/cd.deleted"):
        disk.make_directory(left)
        disk.create(f"{left}/manifest.json")
    disk.restart()
    storage = stored(disk)
    assert load(storage.open(SESSION)) == (0, 0)
    assert files(disk, "sessions") == [SESSION]
    assert files(disk) == ["head.json", f"snapshot-{0:020d}"]


def test_second_server_is_kept_out() -> None:
    disk = MemoryDisk()
    storage = stored(disk)
    with pytest.raises(StorageBusyError, match="another server"):
        stored(disk)
    storage.close()
    stored(disk)


def test_directory_of_another_version_or_of_something_else_is_refused() -> None:
    disk = MemoryDisk()
    stored(disk).close()
    disk.overwrite("version.json", encode_document({}).replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(DamagedError):  # The checksum tells that somebody has changed it.
        stored(disk)
    disk.remove("version.json")
    with pytest.raises(DamagedError, match="missing, beside sessions"):
        stored(disk)


def test_documents_of_a_newer_server_are_told_from_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = MemoryDisk()
    with monkeypatch.context() as newer:
        newer.setattr("optserve_server.storage.document.FORMAT", 2)
        stored(disk).close()
    with pytest.raises(StorageVersionError):
        stored(disk)
    assert not disk.is_locked
