"""Commits of many sessions: gathered, each answered, and nobody is left waiting."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from faults.disks import MemoryDisk, MemoryFile
from unit.storage.sessions import ORIGIN, append, begun, commit, load, restored

from optserve_server.core.storage import StorageFailedError
from optserve_server.storage.disk import File, LocalDisk
from optserve_server.storage.local import LocalStorage


class SlowDisk(MemoryDisk):
    """Syncs files when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Semaphore(0)
        self.groups: list[list[str]] = []
        self.fault: Exception | None = None

    def sync_files(self, files: Sequence[File]) -> Mapping[File, OSError]:
        """See Disk."""
        if not any(file.path.endswith(".log") for file in files):
            return super().sync_files(files)
        self.groups.append([file.path.split("/")[1] for file in files])
        assert self.go.acquire(timeout=30)
        if self.fault is not None:
            raise self.fault
        return super().sync_files(files)


class LateDisk(MemoryDisk):
    """Has something happen once, right after names were synced."""

    after_names: Callable[[], None] | None = None

    def sync_directory(self, path: str) -> None:
        """See Disk."""
        super().sync_directory(path)
        after, self.after_names = self.after_names, None
        if after is not None:
            after()


@pytest.fixture
def disk() -> SlowDisk:
    return SlowDisk()


def test_sessions_that_wait_for_the_disk_share_the_next_sync(disk: SlowDisk) -> None:
    storage = LocalStorage(disk, ORIGIN)
    stores = [begun(storage, name) for name in ("a", "b", "c", "d")]
    for store in stores:
        append(store, 1)
    first = stores[0].commit()
    while not disk.groups:
        time.sleep(0.001)
    later = [store.commit() for store in stores[1:]] + [stores[1].commit()]
    append(stores[0], 1)  # The sync has begun: this one is not among what it promises.
    disk.go.release()
    first.result(timeout=30)
    assert stores[0].durable_sequence == 1
    later.append(stores[0].commit())
    for _ in range(2):
        disk.go.release()
    for each in later:
        each.result(timeout=30)
    assert [store.durable_sequence for store in stores] == [2, 1, 1, 1]
    assert disk.groups[0] == ["a"]
    assert disk.groups[1][:3] == ["b", "c", "d"]  # And "a", if it came before they began.


def test_whoever_stops_waiting_stops_nobody_else(disk: SlowDisk) -> None:
    storage = LocalStorage(disk, ORIGIN)
    store = begun(storage)
    append(store, 1)
    waiting = store.commit()
    assert not waiting.cancel()
    disk.go.release()
    waiting.result(timeout=30)


def test_failed_sync_is_told_to_those_whose_it_was(disk: SlowDisk) -> None:
    storage = LocalStorage(disk, ORIGIN)
    stores = [begun(storage, name) for name in ("a", "b")]
    for store in stores:
        append(store, 1)

    def fail(operation: str) -> None:
        if operation.startswith("sync sessions/a/journal"):
            raise OSError(errno.EIO, "Input/output error")

    disk.before = fail
    for _ in range(2):
        disk.go.release()
    bad, good = [store.commit() for store in stores]
    with pytest.raises(StorageFailedError, match="sessions/a: Input/output error"):
        bad.result(timeout=30)
    good.result(timeout=30)


def test_segment_that_begins_under_a_commit_is_there_after_a_power_loss() -> None:
    disk = LateDisk()
    storage = LocalStorage(disk, ORIGIN, segment_bytes_max=1)  # One for each record.
    store = begun(storage)
    append(store, 1)
    disk.after_names = lambda: append(store, 1)
    for _ in range(2):
        store.commit().result(timeout=30)
    assert store.durable_sequence == 2
    disk.lose_power()
    assert restored(disk) == (0, 2)


def test_file_that_cannot_be_closed_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(MemoryDisk(), ORIGIN, segment_bytes_max=1)
    store, other = begun(storage, "a"), begun(storage, "b")
    append(store, 1)
    commit(store)

    def close(file: MemoryFile) -> None:
        file.closed = True
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))  # As NFS does.

    monkeypatch.setattr(MemoryFile, "close", close)
    append(store, 1)
    commit(store)
    append(other, 1)
    commit(other)
    store.close()


def test_fault_of_ours_leaves_nobody_waiting(disk: SlowDisk) -> None:
    storage = LocalStorage(disk, ORIGIN)
    store, other = begun(storage, "a"), begun(storage, "b")
    append(store, 1)
    disk.fault = RuntimeError("can't start new thread")
    disk.go.release()
    with pytest.raises(StorageFailedError, match="RuntimeError"):
        store.commit().result(timeout=30)
    disk.fault = None
    append(other, 1)
    disk.go.release()
    other.commit().result(timeout=30)


def test_many_sessions_open_append_commit_and_close_at_once(tmp_path: Path) -> None:
    storage = LocalStorage(LocalDisk(tmp_path), ORIGIN, segment_bytes_max=4000)

    def live(number: int) -> int:
        random = Random(number)
        store = begun(storage, f"{number:x}")
        last: Future[None] | None = None
        for _ in range(4):
            for _ in range(random.randrange(1, 12)):
                append(store, 1)
                if random.random() < 0.5:
                    last = store.commit()
            store.close()
            assert store.durable_sequence == store.sequence
            store = storage.open(store.session_id)
            load(store)
        if last is not None:
            last.result(timeout=30)
        store.close()
        return store.sequence

    with ThreadPoolExecutor(8) as pool:
        sequences = list(pool.map(live, range(16)))
    storage.close()
    storage = LocalStorage(LocalDisk(tmp_path), ORIGIN)
    for number, sequence in enumerate(sequences):
        store = storage.open(f"{number:x}")
        assert load(store) == (0, sequence)
        store.close()
    storage.close()
