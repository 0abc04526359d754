"""A process is killed, or a machine loses its power, before any operation of the disk."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import pytest
from faults.disks import CrashError, MemoryDisk
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

from optserve_server.core.storage import CheckpointKey, NotStoredError, StorageError
from optserve_server.storage.disk import File

OTHER = "07e5"
KEY = CheckpointKey(tenant="ours", session_id=SESSION, name="best")
SEGMENT_BYTES = 2500  # Three or four records.


@dataclass
class Acknowledged:
    """What storage has said so far."""

    created: bool = False
    appended: int = 0
    committed: int = 0
    renamed: bool = False
    checkpoint: bool = False
    deleted: bool = False
    deleting: bool = field(default=False)


def live(disk: MemoryDisk, said: Acknowledged) -> None:
    """Do everything that a server does with its storage."""
    storage = stored(disk, segment_bytes_max=SEGMENT_BYTES)
    store = begun(storage)
    said.created = True
    for count, after in ((3, None), (2, 5), (2, 6), (3, None), (1, 11), (2, None)):
        for _ in range(count):
            append(store, 1)
            said.appended += 1
        if count != 2:
            commit(store)
            said.committed = said.appended
        if after is not None:
            store.save_snapshot(snapshot_of(after))
            said.committed = max(said.committed, after)
    storage.save_checkpoint(KEY, {}, snapshot_of(11))
    said.checkpoint = True
    store.update_facts({**facts_of(SESSION), "name": "renamed"})
    said.renamed = True
    other = begun(storage, OTHER)
    append(other, 1)
    other.close()
    said.deleting = True
    storage.delete(OTHER)
    said.deleted = True
    store.close()
    said.committed = said.appended
    storage.close()


def check(disk: MemoryDisk, said: Acknowledged, least: int) -> None:
    """See that the session is there with at least ``least`` records, and can go on."""
    storage = stored(disk)
    there = {session.session_id: session for session in storage.sessions()}
    if said.created:
        assert SESSION in there
    if said.deleted:
        assert OTHER not in there
    assert not any(session.damage for session in there.values())
    if SESSION in there:
        name = there[SESSION].facts["name"]
        assert name == "renamed" or not said.renamed
        store = storage.open(SESSION)
        _, last = load(store)
        assert least <= last <= said.appended + 1  # One may be written, and not acknowledged.
        append(store, 2)
        commit(store)
        store.save_snapshot(snapshot_of(last + 1))
        store.close()
    if said.checkpoint:
        assert storage.load_checkpoint(KEY)[1].sequence == 11
    else:
        assert len(storage.checkpoints("ours")) <= 1
    storage.close()
    if SESSION in there:
        assert restored(disk) == (last + 1, last + 2)
    disk.restart()


def operations() -> Sequence[str]:
    """Return every operation of a life that nothing disturbs."""
    disk = MemoryDisk()
    live(disk, Acknowledged())
    return tuple(disk.operations)


OPERATIONS = operations()


def crashed_before(position: int, disk: MemoryDisk) -> Acknowledged:
    """Live until just before one operation of the disk."""
    left = iter(range(position + 1))

    def stop(_: str) -> None:
        if next(left) == position:
            raise CrashError

    disk.before = stop
    said = Acknowledged()
    with pytest.raises(CrashError):
        live(disk, said)
    return said


def test_a_life_has_every_kind_of_operation() -> None:
    kinds = {operation.split()[0] for operation in OPERATIONS}
    # Nothing is read back of what has been written.
    assert kinds == {"create", "list", "lock", "make", "remove", "rename", "sync", "write"}
    assert sum("journal-" in operation for operation in OPERATIONS if "create" in operation) > 4
    assert any("remove" in operation for operation in OPERATIONS if "journal-" in operation)


@pytest.mark.parametrize("seed", range(2))
def test_killed_process_loses_no_record_that_was_appended(seed: int) -> None:
    for position in range(len(OPERATIONS)):
        disk = MemoryDisk(Random(seed))
        said = crashed_before(position, disk)
        disk.restart()
        check(disk, said, least=said.appended)


@pytest.mark.parametrize("seed", range(4))
def test_power_loss_leaves_every_record_that_was_committed(seed: int) -> None:
    for position in range(len(OPERATIONS)):
        disk = MemoryDisk(Random(seed))
        said = crashed_before(position, disk)
        disk.lose_power()
        check(disk, said, least=said.committed)


@pytest.mark.parametrize("seed", range(2))
def test_power_loss_while_recovering_from_one_loses_nothing_more(seed: int) -> None:
    for position in range(3, len(OPERATIONS), 17):
        disk = MemoryDisk(Random(seed))
        said = crashed_before(position, disk)
        disk.lose_power()
        for second in range(0, 40, 3):
            left = iter(range(second + 1))

            def stop(_: str, left: object = left, second: int = second) -> None:
                if next(left, second) == second:  # type: ignore[call-overload]
                    raise CrashError

            disk.before = stop
            with contextlib.suppress(CrashError, NotStoredError):
                restored(disk)
            disk.lose_power()
        check(disk, said, least=said.committed)


class ForgetfulDisk(MemoryDisk):
    """Acknowledges syncs of files, and does not make them."""

    def sync_files(self, files: Sequence[File]) -> Mapping[File, OSError]:
        """Do nothing."""
        return dict.fromkeys(files[:0], OSError())


class NamelessDisk(MemoryDisk):
    """Acknowledges syncs of directories, and does not make them."""

    def sync_directory(self, path: str) -> None:
        """Do nothing."""


@pytest.mark.parametrize("kind", [ForgetfulDisk, NamelessDisk])
def test_the_disk_of_these_tests_tells_when_a_sync_is_left_out(kind: type[MemoryDisk]) -> None:
    def survives(seed: int) -> bool:
        disk = kind(Random(seed))
        said = Acknowledged()
        live(disk, said)
        disk.lose_power()
        try:
            check(disk, said, least=said.committed)
        except (AssertionError, StorageError):
            return False
        return True

    assert not all(survives(seed) for seed in range(10))
