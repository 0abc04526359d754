"""A disk without room, and a disk that fails: told apart, and survived."""

from __future__ import annotations

import errno
import os

import pytest
from faults.disks import MemoryDisk
from unit.storage.sessions import (
    SESSION,
    append,
    begun,
    commit,
    load,
    record_of,
    restored,
    snapshot_of,
    stored,
)

from optserve_server.core.storage import (
    AlreadyStoredError,
    CheckpointKey,
    NotStoredError,
    StorageFailedError,
    StorageFullError,
)

KEY = CheckpointKey(tenant="ours", session_id=SESSION, name="best")


@pytest.mark.parametrize("room", range(0, 900, 50))
def test_record_without_room_is_not_there_and_has_its_turn_later(room: int) -> None:
    disk = MemoryDisk()
    storage = stored(disk)
    store = begun(storage)
    append(store, 2)
    before = disk.used_bytes
    disk.capacity = before + room
    with pytest.raises(StorageFullError, match="No space left"):
        append(store, 2)
    disk.capacity = 1 << 40
    append(store, 2)
    commit(store)
    last = store.sequence
    disk.restart()
    assert restored(disk) == (0, last)


def test_first_record_without_room_for_its_segment_has_its_turn_later() -> None:
    for room in range(0, 300, 20):
        disk = MemoryDisk()
        store = begun(stored(disk))
        disk.capacity = disk.used_bytes + room
        with pytest.raises(StorageFullError):
            append(store, 1)
        disk.capacity = 1 << 40
        append(store, 1)
        disk.restart()
        assert restored(disk) == (0, 1)


def test_half_a_record_that_cannot_be_cut_off_keeps_the_next_one_away() -> None:
    disk = MemoryDisk()
    store = begun(stored(disk))
    append(store, 2)
    disk.capacity = disk.used_bytes + 100

    def fail(operation: str) -> None:
        if operation.startswith("truncate"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk.before = fail
    for _ in range(2):
        with pytest.raises(StorageFailedError):
            append(store, 1)
    disk.before = lambda _: None
    disk.capacity = 1 << 40
    append(store, 1)
    disk.restart()
    assert restored(disk) == (0, 3)


@pytest.mark.parametrize("room", range(0, 800, 70))
def test_snapshot_without_room_changes_nothing(room: int) -> None:
    disk = MemoryDisk()
    storage = stored(disk)
    store = begun(storage)
    append(store, 3)
    before = disk.used_bytes
    disk.capacity = before + room
    with pytest.raises(StorageFullError):
        store.save_snapshot(snapshot_of(3))
    with pytest.raises(StorageFullError):
        storage.save_checkpoint(KEY, {}, snapshot_of(3))
    with pytest.raises(StorageFullError):
        begun(storage, "07e5")
    assert disk.used_bytes == before
    assert store.snapshot_sequence == 0
    assert storage.checkpoints("ours") == []
    assert len(storage.sessions()) == 1
    disk.capacity = 1 << 40
    store.save_snapshot(snapshot_of(3))
    storage.save_checkpoint(KEY, {}, snapshot_of(3))
    store.close()
    storage.close()
    assert restored(disk) == (3, 3)


def test_failed_sync_ends_the_store_and_what_was_committed_is_there() -> None:
    disk = MemoryDisk()
    storage = stored(disk)
    store = begun(storage)
    append(store, 2)
    commit(store)
    append(store, 1)
    disk.before = _fail_to_sync_journals
    with pytest.raises(StorageFailedError, match="Input/output error"):
        commit(store)
    disk.before = lambda _: None
    with pytest.raises(StorageFailedError):  # To sync again would say that all is well.
        commit(store)
    with pytest.raises(StorageFailedError):
        append(store, 1)
    with pytest.raises(StorageFailedError):
        store.save_snapshot(snapshot_of(3))
    assert store.durable_sequence == 2
    other = begun(storage, "07e5")
    append(other, 1)
    commit(other)
    disk.lose_power()
    assert restored(disk)[1] >= 2
    assert restored(disk, "07e5") == (0, 1)


@pytest.mark.parametrize("segment_bytes", [1, 1 << 20], ids=["apart", "together"])
def test_record_that_a_failed_sync_has_left_in_memory_only_is_written_again(
    segment_bytes: int,
) -> None:
    disk = MemoryDisk()
    storage = stored(disk, segment_bytes_max=segment_bytes)
    store = begun(storage)
    append(store, 1)
    commit(store)
    append(store, 1)
    disk.before = _fail_to_sync_journals
    with pytest.raises(StorageFailedError):
        commit(store)
    disk.restart()
    storage = stored(disk)
    store = storage.open(SESSION)
    assert load(store) == (0, 2)  # The system shows it, and takes it for written.
    append(store, 1)
    commit(store)
    disk.lose_power()
    assert restored(disk) == (0, 3)


def test_store_that_is_closed_takes_nothing_and_may_be_closed_again() -> None:
    disk = MemoryDisk()
    storage = stored(disk)
    store = begun(storage)
    append(store, 1)
    store.close()
    store.close()
    with pytest.raises(StorageFailedError, match="closed"):
        store.append(record_of(2))
    disk.lose_power()
    assert restored(disk) == (0, 1)


def test_names_are_given_once_and_found_or_not() -> None:
    storage = stored(MemoryDisk())
    begun(storage).close()
    with pytest.raises(AlreadyStoredError):
        begun(storage)
    storage.save_checkpoint(KEY, {}, snapshot_of(0))
    with pytest.raises(AlreadyStoredError):
        storage.save_checkpoint(KEY, {}, snapshot_of(0))
    storage.delete(SESSION)
    storage.delete_checkpoint(KEY)
    for act in (storage.open, storage.delete):
        with pytest.raises(NotStoredError):
            act(SESSION)
    with pytest.raises(NotStoredError):
        storage.load_checkpoint(KEY)
    with pytest.raises(NotStoredError):
        storage.delete_checkpoint(KEY)
    begun(storage).close()
    assert load(storage.open(SESSION)) == (0, 0)


def _fail_to_sync_journals(operation: str) -> None:
    if operation.startswith("sync") and operation.endswith(".log"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
