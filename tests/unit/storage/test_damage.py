"""Damage is told from a torn tail, named to the byte, and worked round where that loses nothing."""

from __future__ import annotations

import errno
from random import Random

import pytest
from faults.disks import MemoryDisk
from unit.storage.sessions import (
    SESSION,
    append,
    begun,
    commit,
    facts_of,
    load,
    restored,
    snapshot_of,
    stored,
)

from optserve_server.core.storage import DamagedError, StorageVersionError, UnreadableError
from optserve_server.storage.segment import HEAD_BYTES

DIRECTORY = f"sessions/{SESSION}"
FIRST = f"{DIRECTORY}/journal-{1:020d}.log"


def disk_with(*, records: int, snapshots: tuple[int, ...] = (), commits: bool = True) -> MemoryDisk:
    """Return a disk with one session, whose server has been killed."""
    disk = MemoryDisk(Random(0))
    storage = stored(disk)
    store = begun(storage)
    for number in range(1, records + 1):
        append(store, 1)
        if commits:
            commit(store)
        if number in snapshots:
            store.save_snapshot(snapshot_of(number))
    disk.restart()
    return disk


def record_begins(data: bytes) -> list[int]:
    """Return where the records of a segment begin."""
    found = range(0, len(data), 64)
    return [offset for offset in found if data[offset : offset + 4] == b"OPRC"]


def test_torn_tail_is_cut_wherever_it_ends() -> None:
    disk = disk_with(records=3)
    whole = disk.read(FIRST)
    begin = record_begins(whole)[-1]
    for end in range(begin, len(whole) - 63):
        disk.overwrite(FIRST, whole[:end])
        assert restored(disk) == (0, 2)
        assert len(disk.read(FIRST)) == begin
        disk.restart()


@pytest.mark.parametrize("position", range(3))
def test_flipped_bit_in_any_record_is_damage_that_is_named(position: int) -> None:
    disk = disk_with(records=3, commits=False)
    whole = disk.read(FIRST)
    begins = [*record_begins(whole), len(whole)]
    body_end = begins[position + 1] - 64  # Behind it there may be what rounds it up.
    begin = begins[position]
    # All of the head and of what the facts begin with, and some of the rest.
    for offset in (*range(begin, begin + 80), *range(begin + 80, body_end, 7)):
        disk.overwrite(FIRST, whole)
        disk.damage(FIRST, offset)
        with pytest.raises(DamagedError) as raised:
            restored(disk)
        assert (raised.value.path, raised.value.offset) == (FIRST, begin)
        disk.restart()


def test_flipped_bit_in_a_header_is_damage() -> None:
    disk = disk_with(records=3, commits=False)
    whole = disk.read(FIRST)
    length = len(whole[: record_begins(whole)[0]].rstrip(b"\0"))
    for offset in range(length):
        disk.overwrite(FIRST, whole)
        disk.damage(FIRST, offset)
        with pytest.raises((DamagedError, StorageVersionError)):
            restored(disk)
        disk.restart()


def test_lost_middle_of_a_committed_journal_is_damage_after_a_power_loss_too() -> None:
    disk = disk_with(records=4)
    disk.lose_power()
    begins = record_begins(disk.read(FIRST))
    disk.damage(FIRST, begins[1] + HEAD_BYTES)
    with pytest.raises(DamagedError, match="record 2"):
        restored(disk)


def test_hole_before_what_was_never_synced_is_cut_after_a_power_loss() -> None:
    disk = disk_with(records=4, commits=False)
    disk.open(FIRST).sync()  # The system may write it whenever it likes.
    disk.sync_directory(DIRECTORY)
    disk.lose_power()
    disk.damage(FIRST, record_begins(disk.read(FIRST))[1] + HEAD_BYTES)
    assert restored(disk) == (0, 1)
    assert restored(disk) == (0, 1)


def test_damage_in_one_session_harms_no_other() -> None:
    disk = disk_with(records=3)
    storage = stored(disk)
    other = begun(storage, "07e5")
    append(other, 2)
    other.close()
    storage.close()
    disk.damage(FIRST, record_begins(disk.read(FIRST))[1])
    with pytest.raises(DamagedError):
        restored(disk)
    assert restored(disk, "07e5") == (0, 2)


def test_damage_in_what_the_snapshot_contains_does_no_harm() -> None:
    disk = disk_with(records=9, snapshots=(3,))
    first = record_begins(disk.read(FIRST))
    disk.damage(FIRST, first[0])
    disk.damage(FIRST, first[1] + HEAD_BYTES)
    assert restored(disk) == (3, 9)


@pytest.mark.parametrize("name", ["tensors.safetensors", "manifest.json"])
def test_damaged_snapshot_is_replaced_by_the_one_before_and_the_journal(name: str) -> None:
    disk = disk_with(records=9, snapshots=(3, 6))
    path = f"{DIRECTORY}/snapshot-{6:020d}/{name}"
    disk.damage(path, len(disk.read(path)) // 2)
    storage = stored(disk)
    store = storage.open(SESSION)
    loaded = store.load()
    assert loaded.snapshot.sequence == 3
    assert [record.sequence for record in loaded.records] == [4, 5, 6, 7, 8, 9]
    (skipped,) = loaded.skipped
    assert skipped.sequence == 6
    assert skipped.damage.path == path
    # The next snapshot takes the place of the damaged one, and all is well again.
    store.save_snapshot(snapshot_of(9))
    store.close()
    storage.close()
    assert restored(disk) == (9, 9)


def test_journal_from_the_previous_snapshot_on_is_kept_though_it_has_many_segments() -> None:
    disk = MemoryDisk(Random(0))
    store = begun(stored(disk, segment_bytes_max=2500))
    append(store, 12)
    store.save_snapshot(snapshot_of(3))
    store.save_snapshot(snapshot_of(9))
    store.close()
    disk.restart()
    disk.damage(f"{DIRECTORY}/snapshot-{9:020d}/manifest.json", 60)
    assert restored(disk) == (3, 12)


@pytest.mark.parametrize("seed", range(12))
def test_what_was_loaded_after_a_kill_survives_a_power_loss(seed: int) -> None:
    disk = MemoryDisk(Random(seed))
    append(begun(stored(disk)), 2)  # Neither the records nor the segment's name are synced.
    disk.restart()
    assert load(stored(disk).open(SESSION)) == (0, 2)
    disk.lose_power()
    assert restored(disk) == (0, 2)


def test_session_whose_snapshots_are_all_damaged_is_refused() -> None:
    disk = disk_with(records=3, snapshots=(2,))
    for number in (0, 2):
        disk.damage(f"{DIRECTORY}/snapshot-{number:020d}/manifest.json", 40)
    with pytest.raises(DamagedError, match="snapshot-00000000000000000002"):
        restored(disk)


def test_missing_segment_is_damage() -> None:
    disk = disk_with(records=9, snapshots=(3, 6))
    disk.remove(f"{DIRECTORY}/journal-{7:020d}.log")
    assert restored(disk) == (6, 6)  # Nothing says that there was one.
    disk = disk_with(records=9, snapshots=(3, 6))
    disk.remove(f"{DIRECTORY}/journal-{4:020d}.log")
    disk.remove(f"{DIRECTORY}/snapshot-{6:020d}/manifest.json")
    with pytest.raises(DamagedError, match="record 4 "):
        restored(disk)


def test_segment_of_another_session_is_damage() -> None:
    disk = disk_with(records=2)
    storage = stored(disk)
    other = begun(storage, "07e5")
    append(other, 2)
    other.close()
    storage.close()
    disk.overwrite(FIRST, disk.read(FIRST.replace(SESSION, "07e5")))
    with pytest.raises(DamagedError, match="belongs to session 07e5"):
        restored(disk)


def test_damaged_head_is_made_up_for_by_a_manifest() -> None:
    disk = disk_with(records=2)
    disk.damage(f"{DIRECTORY}/head.json", 60)
    storage = stored(disk)
    (session,) = storage.sessions()
    assert session.damage is None
    assert session.facts == facts_of(SESSION)
    assert load(storage.open(SESSION)) == (0, 2)


def test_session_without_a_readable_name_is_told_of() -> None:
    disk = disk_with(records=2)
    disk.damage(f"{DIRECTORY}/head.json", 60)
    disk.damage(f"{DIRECTORY}/snapshot-{0:020d}/manifest.json", 60)
    storage = stored(disk)
    (session,) = storage.sessions()
    assert session.session_id == SESSION
    assert session.damage is not None
    assert session.facts == {}
    with pytest.raises(DamagedError):
        storage.open(SESSION)


@pytest.mark.parametrize("unreadable", ["head.json", "snapshot-"])
def test_what_the_disk_cannot_read_is_damage_of_its_session_and_no_other(unreadable: str) -> None:
    disk = disk_with(records=3, snapshots=(2,))
    begun(stored(disk), "07e5").close()
    disk.restart()

    def fail(operation: str) -> None:
        if operation.startswith(f"read {DIRECTORY}/{unreadable}"):
            raise OSError(errno.EIO, "a bad sector")

    disk.before = fail
    storage = stored(disk)
    assert [session.facts for session in storage.sessions()] == [
        facts_of(SESSION),
        facts_of("07e5"),
    ]
    store = storage.open(SESSION)
    if unreadable == "head.json":  # Every manifest says the same.
        assert load(store) == (2, 3)
    else:
        with pytest.raises(UnreadableError, match="byte 0: the disk cannot read it"):
            store.load()
    store.close()
    other = storage.open("07e5")
    assert load(other) == (0, 0)
    other.close()
    storage.close()
