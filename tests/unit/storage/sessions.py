"""Sessions to be stored, whose every record and snapshot follows from its number."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from faults.disks import MemoryDisk
from torch import Tensor

from optserve_server.core.storage import Json, Origin, Record, RecordKind, SessionStore, Snapshot
from optserve_server.storage.local import LocalStorage

ORIGIN = Origin(torch="2.13.0+cpu", device="cpu")
SESSION = "5e55"


def stored(disk: MemoryDisk, *, segment_bytes_max: int = 1 << 20) -> LocalStorage:
    """Return the storage on a disk, as a server does at its start."""
    return LocalStorage(disk, ORIGIN, segment_bytes_max=segment_bytes_max, threaded=False)


def begun(storage: LocalStorage, session_id: str = SESSION) -> SessionStore:
    """Return the store of a new session."""
    return storage.create(session_id, facts_of(session_id), snapshot_of(0))


def facts_of(session_id: str) -> Mapping[str, Json]:
    """Return what the catalogue says of a session."""
    return {"tenant": "ours", "name": f"session {session_id}"}


def record_of(sequence: int) -> Record:
    """Return a record: its kind, facts and tensors are its number's, 600 bytes and more."""
    kinds = list(RecordKind)
    tensors = [(i, _values(sequence, i, 70 * i)) for i in range(1 + sequence % 3)]
    return Record(
        sequence=sequence,
        kind=kinds[sequence % len(kinds)],
        facts={"step": sequence, "loss": sequence / 3},
        tensors=[*tensors, (9, _values(sequence, 9, 120))],
    )


def snapshot_of(sequence: int) -> Snapshot:
    """Return the state after a record."""
    tensors = {"weight": _values(sequence, 1, 100), "bias": _values(sequence, 2, 3).bfloat16()}
    return Snapshot(sequence=sequence, facts={"steps": sequence}, tensors=tensors)


def append(store: SessionStore, count: int) -> None:
    """Append the next records."""
    for _ in range(count):
        store.append(record_of(store.sequence + 1))


def commit(store: SessionStore) -> None:
    """Wait until what was appended is on stable storage."""
    store.commit().result(timeout=10)


def restored(disk: MemoryDisk, session_id: str = SESSION) -> tuple[int, int]:
    """Load a session as a server does at its start, and look at all that it holds.

    Returns:
        The number of its snapshot, and that of its last record.
    """
    storage = stored(disk)
    try:
        store = storage.open(session_id)
        numbers = load(store)
        store.close()
        return numbers
    finally:
        storage.close()


def load(store: SessionStore) -> tuple[int, int]:
    """Load a session, and see that everything in it is what its number says."""
    loaded = store.load()
    last = loaded.snapshot.sequence
    assert_same_snapshot(loaded.snapshot, snapshot_of(last))
    for record in loaded.records:
        last += 1
        assert_same_record(record, record_of(last))
    assert store.sequence == last
    return loaded.snapshot.sequence, last


def assert_same_record(came: Record, expected: Record) -> None:
    """See that a record came back as it was."""
    assert (came.sequence, came.kind, came.facts) == (
        expected.sequence,
        expected.kind,
        expected.facts,
    )
    assert [number for number, _ in came.tensors] == [number for number, _ in expected.tensors]
    for (_, one), (_, other) in zip(came.tensors, expected.tensors, strict=True):
        assert_same_tensor(one, other)


def assert_same_snapshot(came: Snapshot, expected: Snapshot) -> None:
    """See that a snapshot came back as it was."""
    assert (came.sequence, came.facts) == (expected.sequence, expected.facts)
    assert came.tensors.keys() == expected.tensors.keys()
    for name, tensor in came.tensors.items():
        assert_same_tensor(tensor, expected.tensors[name])


def assert_same_tensor(came: Tensor, expected: Tensor) -> None:
    """See that a tensor came back bit for bit, with its type and shape."""
    assert came.dtype == expected.dtype
    assert came.shape == expected.shape
    assert torch.equal(_bits(came), _bits(expected))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _values(sequence: int, seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * sequence + seed)
    return torch.randn(count, generator=generator)
