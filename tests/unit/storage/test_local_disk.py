"""A real directory: what the disk in memory cannot show."""

from __future__ import annotations

import os
import stat
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from unit.storage.sessions import (
    ORIGIN,
    append,
    assert_same_record,
    begun,
    load,
    snapshot_of,
)

from optserve_server.core.storage import Record, RecordKind, StorageBusyError, StorageFailedError
from optserve_server.storage import disk as disk_module
from optserve_server.storage import snapshot as snapshot_module
from optserve_server.storage.disk import LocalDisk, LocalFile, translated
from optserve_server.storage.local import LocalStorage


def storage_in(root: Path) -> LocalStorage:
    """Return the storage in a directory, as a server does at its start."""
    return LocalStorage(LocalDisk(root), ORIGIN)


def test_sessions_come_back_from_a_directory(tmp_path: Path) -> None:
    storage = storage_in(tmp_path / "data")
    stores = [begun(storage, f"{number:x}") for number in range(8)]
    for _ in range(3):
        commits: list[Future[None]] = []
        for store in stores:
            append(store, 1)
            commits.append(store.commit())
        for commit in commits:
            commit.result(timeout=60)
    assert all(store.durable_sequence == 3 for store in stores)
    stores[0].save_snapshot(snapshot_of(2))
    for store in stores:
        store.close()
    storage.close()

    storage = storage_in(tmp_path / "data")
    assert len(storage.sessions()) == 8
    for session in storage.sessions():
        store = storage.open(session.session_id)
        assert load(store) == (2 if session.session_id == "0" else 0, 3)
        store.close()
    storage.close()


def test_others_can_read_nothing(tmp_path: Path) -> None:
    storage = storage_in(tmp_path / "data")
    store = begun(storage)
    append(store, 1)
    store.close()
    storage.close()
    for path in (tmp_path / "data", *(tmp_path / "data").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_second_server_is_told_that_the_directory_is_in_use(tmp_path: Path) -> None:
    storage = storage_in(tmp_path)
    with pytest.raises(StorageBusyError, match=f"another server uses .* {tmp_path}"):
        storage_in(tmp_path)
    storage.close()
    storage_in(tmp_path).close()


def test_record_of_thousands_of_tensors_comes_back(tmp_path: Path) -> None:
    storage = storage_in(tmp_path)
    store = begun(storage)
    sizes = [(number * 7919) % 333 for number in range(3000)]  # More pieces than one call takes.
    tensors = [(position, torch.rand(size)) for position, size in enumerate(sizes)]
    record = Record(sequence=1, kind=RecordKind.STEP, tensors=tensors)
    store.append(record)
    store.close()
    store = storage.open(store.session_id)
    (came,) = store.load().records
    assert_same_record(came, record)
    store.close()
    storage.close()


def test_write_that_the_system_cuts_short_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_module, "_WRITE_BYTES_MAX", 1000)
    monkeypatch.setattr(disk_module, "_PIECES_MAX", 3)
    file = LocalDisk(tmp_path).create("file")
    pieces = [bytes([number]) * (number * 97 % 2500) for number in range(50)]
    file.write_at(5, pieces)
    file.close()
    assert (tmp_path / "file").read_bytes() == bytes(5) + b"".join(pieces)


@pytest.mark.parametrize("burst_bytes", [7, 64, 400, 1000])
def test_snapshot_that_is_written_in_bursts_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, burst_bytes: int
) -> None:
    monkeypatch.setattr(snapshot_module, "_BURST_BYTES", burst_bytes)
    storage = storage_in(tmp_path)
    store = begun(storage)
    store.save_snapshot(snapshot_of(1))
    store.close()
    assert load(storage.open(store.session_id)) == (1, 1)
    storage.close()


@pytest.mark.parametrize("count", [1, 3, 4, 30])
@pytest.mark.parametrize("has_syncfs", [True, False])
def test_files_are_synced_apart_or_together(tmp_path: Path, count: int, has_syncfs: bool) -> None:
    disk = LocalDisk(tmp_path)
    if not has_syncfs:
        disk._syncfs = None
    files = [disk.create(f"{number}") for number in range(count)]
    assert disk.sync_files(files) == {}
    if has_syncfs:
        disk._syncfs = lambda _: -1  # type: ignore[assignment]
    source, target = os.pipe()  # What cannot be synced.
    os.close(target)
    broken = LocalFile("broken", source)
    assert list(disk.sync_files([*files, broken])) == [broken]
    for file in (*files, broken):
        file.close()


def test_write_that_failed_under_others_sync_fails_its_own(tmp_path: Path) -> None:
    disk = LocalDisk(tmp_path)
    answers = iter([-1])  # As the system does: told once, to whoever asks first.
    disk._syncfs = lambda _: next(answers, 0)  # type: ignore[assignment]
    files = [disk.create(f"{number}") for number in range(4)]
    source, target = os.pipe()  # What cannot be synced.
    os.close(target)
    broken = LocalFile("broken", source)
    assert disk.sync_files(files) == {}
    assert list(disk.sync_files([broken, *files])) == [broken]
    for file in (*files, broken):
        file.close()


def test_missing_file_is_a_failure_that_names_it(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageFailedError, match="some/file: No such file"),
        translated("some/file"),
    ):
        LocalDisk(tmp_path).open("file")


def test_directories_that_are_made_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda each: synced.append(os.fstat(each).st_ino))
    for _ in range(2):  # Once: then they are there.
        LocalDisk(tmp_path / "a" / "data").close()
        assert synced == [tmp_path.stat().st_ino, (tmp_path / "a").stat().st_ino]


def test_data_directory_that_cannot_be_one_says_which_and_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(StorageFailedError, match=rf"^{path}: Not a directory"):
            LocalDisk(path)
    (tmp_path / "lock").mkdir()
    with pytest.raises(StorageFailedError, match=rf"Is a directory \({tmp_path}/lock\)$"):
        storage_in(tmp_path)


def test_snapshot_is_saved_while_records_are_appended(tmp_path: Path) -> None:
    storage = LocalStorage(LocalDisk(tmp_path), ORIGIN, segment_bytes_max=10_000)
    store = begun(storage)
    append(store, 1)
    stop = threading.Event()
    faults: list[BaseException] = []

    def save() -> None:
        try:
            while not stop.is_set():
                store.save_snapshot(snapshot_of(store.sequence))
        except BaseException as error:
            faults.append(error)
            raise

    thread = threading.Thread(target=save)
    thread.start()
    for _ in range(300):
        append(store, 1)
        store.commit().result(timeout=60)
    stop.set()
    thread.join(timeout=60)
    assert not faults
    last = store.sequence
    store.close()
    storage.close()
    storage = storage_in(tmp_path)
    store = storage.open(store.session_id)
    assert load(store)[1] == last
    store.close()
    storage.close()
