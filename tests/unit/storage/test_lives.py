"""Sessions that live through many servers, each of which ends in its own way, by chance."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest
from faults.disks import CrashError, MemoryDisk
from unit.storage.sessions import SESSION, append, begun, load, snapshot_of, stored

from optserve_server.core.storage import SessionStore, StorageFullError

GENERATIONS = 8
SEGMENT_BYTES = 3000


@dataclass
class Promised:
    """What storage has promised of a session, over all servers."""

    last: int = 0
    """The last record that was appended."""
    committed: int = 0
    """The last one that was put onto stable storage."""


def live(store: SessionStore, disk: MemoryDisk, promised: Promised, random: Random) -> None:
    """Do what a server does with a session, in any order."""
    while True:
        match random.randrange(12):
            case 0:
                store.commit().result()
                promised.committed = promised.last
            case 1:
                sequence = random.randint(store.snapshot_sequence, store.sequence)
                store.save_snapshot(snapshot_of(sequence))
                promised.committed = max(promised.committed, sequence)
            case 2:
                store.update_facts({"name": f"{random.random()}"})
            case 3:
                disk.capacity = disk.used_bytes + random.randrange(1500)
                try:
                    append(store, 1)
                    promised.last = store.sequence
                except StorageFullError:
                    pass
                disk.capacity = 1 << 40
            case _:
                append(store, 1)
                promised.last = store.sequence


def stop_after(disk: MemoryDisk, count: int) -> None:
    """Let the server end before the next operation but so many."""
    left = iter(range(count))

    def stop(_: str) -> None:
        if next(left, None) is None:
            raise CrashError

    disk.before = stop


def end(disk: MemoryDisk, promised: Promised, random: Random) -> None:
    """Let the server that has ended have been killed, or have lost its power."""
    if random.random() < 0.5:
        disk.restart()
    else:
        promised.last = promised.committed
        disk.lose_power()


def opened(disk: MemoryDisk, promised: Promised, random: Random) -> SessionStore:
    """Load the session in a new server; it may end, too, before that is done."""
    while True:
        store = stored(disk, segment_bytes_max=SEGMENT_BYTES).open(SESSION)
        if random.random() < 0.4:
            stop_after(disk, random.randrange(1, 20))
        try:
            _, last = load(store)
        except CrashError:
            end(disk, promised, random)
            continue
        disk.before = lambda _: None
        assert last >= promised.last
        assert store.durable_sequence == last  # What has been read is on stable storage.
        promised.last = promised.committed = last
        return store


@pytest.mark.parametrize("seed", range(40))
def test_nothing_that_was_promised_is_lost_over_many_servers(seed: int) -> None:
    random = Random(seed)
    disk = MemoryDisk(random)
    promised = Promised()
    store = begun(stored(disk, segment_bytes_max=SEGMENT_BYTES))
    for _ in range(GENERATIONS):
        stop_after(disk, random.randrange(1, 60))
        with pytest.raises(CrashError):
            live(store, disk, promised, random)
        disk.capacity = 1 << 40
        end(disk, promised, random)
        store = opened(disk, promised, random)
