"""Measure what storage costs: the numbers of decision 11.

    cd tests && ../.venv/bin/python -m unit.storage.measure_storage [DIRECTORY]

The directory is where to measure, on the disk in question; a temporary one by default.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from unit.storage.sessions import ORIGIN

from optserve_server.core.storage import Record, RecordKind, SessionStore, Snapshot
from optserve_server.storage.disk import File, LocalDisk
from optserve_server.storage.local import LocalStorage

ROUNDS = 15


@dataclass(frozen=True, slots=True)
class Way:
    """Something to be measured, and what must have happened before."""

    act: Callable[[], object]
    before: Callable[[], object] | None = None


def main() -> None:
    """Print all tables."""
    root = Path(tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else None))
    try:
        for count, byte_count in ((64, 40_000), (8, 4_000), (1, 40_000)):
            disk = LocalDisk(root / f"{count}")
            what = f"{byte_count:,} bytes to each of {count} files, made durable"
            compare(what, syncs(disk, count, byte_count))
        storage = LocalStorage(LocalDisk(root / "data"), ORIGIN)
        for elements in (1_000, 10_000, 1_000_000, 25_000_000):
            compare(f"a session of {elements:,} FP32 in 4 tensors", lives(storage, elements))
        storage.close()
    finally:
        shutil.rmtree(root)


def syncs(disk: LocalDisk, count: int, byte_count: int) -> Mapping[str, Way]:
    """Return ways to make what was written to many files durable."""
    data = os.urandom(byte_count)
    files: Sequence[File] = [disk.create(f"{number}") for number in range(count)]
    shared = disk.create("shared")
    ends = itertools.count(step=byte_count)
    shared_ends = itertools.count(step=byte_count * count)
    pool = ThreadPoolExecutor(8)

    def write() -> None:
        end = next(ends)
        for file in files:
            file.write_at(end, [data])

    def write_shared() -> None:
        shared.write_at(next(shared_ends), [data] * count)

    def one_by_one() -> None:
        for file in files:
            file.sync()

    def threads() -> None:
        list(pool.map(lambda file: file.sync(), files))

    return {
        "one by one": Way(one_by_one, before=write),
        "8 threads": Way(threads, before=write),
        "as storage does": Way(lambda: disk.sync_files(files), before=write),
        "one shared file": Way(shared.sync, before=write_shared),
    }


def lives(storage: LocalStorage, elements: int) -> Mapping[str, Way]:
    """Return what a session of a size does with its store."""
    sizes = (elements - elements // 4, elements // 4 - 20, 15, 5)
    tensors = [torch.randn(size) for size in sizes]
    store: SessionStore = storage.create(f"{elements:x}", {}, Snapshot(sequence=0, facts={}))

    def append() -> None:
        record = Record(
            sequence=store.sequence + 1,
            kind=RecordKind.STEP,
            facts={"step": store.sequence, "lr": 0.1},
            tensors=list(enumerate(tensors)),
        )
        store.append(record)

    def commit() -> None:
        append()
        store.commit().result()

    def snapshot() -> None:
        state = {f"{name}.{i}": each for name in "pmv" for i, each in enumerate(tensors)}
        store.save_snapshot(Snapshot(sequence=store.sequence, facts={}, tensors=state))

    def restore() -> None:
        nonlocal store
        store.close()
        store = storage.open(store.session_id)
        for _ in store.load().records:
            pass

    return {
        "first record of a segment": Way(append),
        "record": Way(append),
        "record, and commit": Way(commit, before=commit),
        "snapshot of 3 x as much": Way(snapshot),
        "restore: snapshot, 1 record": Way(restore, before=append),
    }


def compare(what: str, ways: Mapping[str, Way]) -> None:
    """Try all ways in turn, so that what disturbs one disturbs all."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            if way.before is not None:
                way.before()
            began = time.perf_counter()
            way.act()
            times[name].append((time.perf_counter() - began) * 1e3)
    sys.stdout.write(f"{what} (ms: median, least, most of {ROUNDS})\n")
    for name, taken in times.items():
        row = f"{statistics.median(taken):9.2f}{min(taken):9.2f}{max(taken):9.2f}"
        sys.stdout.write(f"  {name:32}{row}\n")


if __name__ == "__main__":
    main()
