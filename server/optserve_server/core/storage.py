"""What the core asks of the place where sessions survive: records, snapshots, checkpoints.

A session on disk is its newest snapshot and the journal from there on:

    snapshot(after record 120)  record 121  record 122  record 123
                                STEP        EPOCH       STEP

The session gives the numbers, from 1 and without gaps, and one to every change of it, whether or
not that change is written to the journal: so a snapshot's number says what it contains.

Everything here may wait for a disk: call it in a thread, but for ``append`` of a small record. A
store has one writer; a snapshot may be saved in one thread while another appends.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from torch import Tensor

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""Facts. Floats come back bit for bit, NaN and infinities too."""


class StorageError(Exception):
    """Something that storage cannot do; the message is for an operator, not for a client."""


class StorageFullError(StorageError):
    """The disk has no room. Nothing was written; the same works once there is room."""


class StorageFailedError(StorageError):
    """The disk has failed to write or to sync: what it holds of this session is unknown.

    The store takes nothing any more. What it holds is found out by opening it again.
    """


class StorageBusyError(StorageError):
    """Another process has the data directory."""


class StorageVersionError(StorageError):
    """The data directory, or a file in it, was written by a newer version of the server."""


class NotStoredError(StorageError):
    """There is no session, or no checkpoint, of this name."""


class AlreadyStoredError(StorageError):
    """There is a session, or a checkpoint, of this name."""


class DamagedError(StorageError):
    """What is on disk is not what was written there."""

    def __init__(self, path: str, offset: int, what: str) -> None:
        """Say that ``what`` is wrong, at byte ``offset`` of the file ``path``."""
        super().__init__(f"{path}: byte {offset}: {what}")
        self.path = path
        self.offset = offset
        self.what = what


class UnreadableError(DamagedError):
    """The disk does not give a file back. It may be what was written, and be read another time."""

    def __init__(self, path: str) -> None:
        """Say that the disk cannot read the file ``path``."""
        super().__init__(path, 0, "the disk cannot read it")


class RecordKind(enum.IntEnum):
    """What a record tells; its number stands on disk, and is never used again."""

    STEP = 1
    PARAMETERS = 2
    EPOCH = 3
    CHANGE = 4
    LOSS_POINT = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One change of a session, with all that it takes to make it again."""

    sequence: int
    """Its number, from 1 and without gaps."""
    kind: RecordKind
    facts: Mapping[str, Json] = field(default_factory=dict)
    tensors: Sequence[tuple[int, Tensor]] = ()
    """On the CPU and contiguous, of any data type and shape, each with a number, from 0, of the
    caller's choice: a parameter's position. Read from disk they are the reader's, to be changed
    as it likes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A session's whole state after record ``sequence``."""

    sequence: int
    """Number of the last change that is in it; 0: none yet."""
    facts: Mapping[str, Json]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """On the CPU and contiguous. Nobody may write to them while the snapshot is being saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Who wrote: another torch, or another device, may make other bits of the same record."""

    torch: str
    """``torch.__version__``."""
    device: str
    """Its kind and model: ``cpu AVX512``, or as CUDA names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedSnapshot:
    """A snapshot that is damaged, in whose place an older one was loaded."""

    sequence: int
    """What it would have contained. A journal makes up for it if its records reach this number;
    a session without a journal has lost what came after the snapshot that was loaded."""
    damage: DamagedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a store holds."""

    snapshot: Snapshot
    """The newest whose checksums hold."""
    records: Iterator[Record]
    """What came after it, one by one, read as they are asked for. At its end a record that was
    not written to its end is cut off.

    Raises, in the middle:
        DamagedError: A record is not what was written, or is missing.
    """
    origins: frozenset[Origin]
    """Who wrote these records; empty if there are none."""
    skipped: Sequence[SkippedSnapshot] = ()
    """Newer ones, newest first."""


class SessionStore(Protocol):
    """Where one session survives."""

    @property
    def session_id(self) -> str:
        """The session's id."""

    @property
    def sequence(self) -> int:
        """Number of the last record or snapshot that was written; what is appended is the next."""

    @property
    def snapshot_sequence(self) -> int:
        """Number of the newest snapshot: what a crash now would leave without the journal."""

    @property
    def durable_sequence(self) -> int:
        """Number of the last record that is on stable storage."""

    @property
    def journal_bytes(self) -> int:
        """Size of the journal, the part that only the previous snapshot needs included."""

    @property
    def kept_bytes(self) -> int:
        """Size of all but the journal: the snapshots, and what the catalogue says."""

    def append(self, record: Record) -> int:
        """Write a record to the end of the journal: from now on it survives the process.

        The tensors are read before it returns, and not held.

        Returns:
            How many bytes it takes there, its facts included.

        Raises:
            StorageFullError: There is no room. Nothing was written, and the number is still free.
            StorageFailedError: The disk has failed, now or before.
        """

    def commit(self) -> Future[None]:
        """Have what was appended put onto stable storage, together with other sessions' records.

        Does not wait. ``await asyncio.wrap_future(store.commit())`` does.

        Returns:
            Done when every record appended before the call survives a power loss. Raises:
            StorageFailedError if that is unknown.
        """

    def save_snapshot(self, snapshot: Snapshot) -> None:
        """Save a snapshot, whole or not at all; on stable storage when it returns.

        The one before it stays, with the journal from there on; what is older goes. Records may be
        appended meanwhile. Saving one of the number of the newest changes nothing.

        Raises:
            StorageFullError: There is no room. Nothing was changed.
            StorageFailedError: The disk has failed.
        """

    def update_facts(self, facts: Mapping[str, Json]) -> None:
        """Replace what the catalogue says of the session; see StoredSession.facts.

        Raises:
            StorageFullError, StorageFailedError: As of save_snapshot.
        """

    def load(self) -> Loaded:
        """Return what is there. To be called once, before anything is written; read to its end.

        Raises:
            DamagedError: No snapshot is whole.
            StorageVersionError: A newer server wrote it.
        """

    def close(self) -> None:
        """Put what was appended onto stable storage, and let go of the files; again: no effect.

        Raises:
            StorageFailedError: The disk has failed. The files are let go.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSession:
    """A session in the catalogue."""

    session_id: str
    facts: Mapping[str, Json]
    """What is known of it without loading it: tenant, request id, name, time of creation."""
    sequence: int
    """Number of its newest snapshot."""
    bytes_on_disk: int
    damage: DamagedError | None = None
    """Why its facts could not be read, which are empty then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointKey:
    """What a checkpoint is found by. It outlives its session."""

    tenant: str
    """Whose it is."""
    session_id: str
    """The session that it was taken from."""
    name: str
    """Unique among the session's; any text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A named snapshot in the catalogue."""

    key: CheckpointKey
    facts: Mapping[str, Json]
    """What is known of it without loading it: time of creation, steps, what a person wrote."""
    sequence: int
    bytes_on_disk: int
    origin: Origin


class Storage(Protocol):
    """All that survives a server."""

    @property
    def free_bytes(self) -> int:
        """How much room there is."""

    def sessions(self) -> Sequence[StoredSession]:
        """Return the sessions that are there, in the order of their creation."""

    def create(
        self, session_id: str, facts: Mapping[str, Json], snapshot: Snapshot
    ) -> SessionStore:
        """Make room for a session, with its first snapshot: whole or not at all.

        Args:
            session_id: Hexadecimal digits.
            facts: What the catalogue shall say of it.
            snapshot: Where it begins; its tensors may be absent if the facts are enough.

        Raises:
            AlreadyStoredError: The session is there.
            StorageFullError: There is no room. Nothing was changed.
            StorageFailedError: The disk has failed.
        """

    def open(self, session_id: str) -> SessionStore:
        """Open a session that is there; load() it before anything else.

        Raises:
            NotStoredError: There is none of this id.
        """

    def delete(self, session_id: str) -> None:
        """Delete a session, whose store is closed; its checkpoints stay.

        Raises:
            NotStoredError: There is none of this id.
            StorageFailedError: The disk has failed.
        """

    def checkpoints(
        self, tenant: str | None = None, session_id: str | None = None
    ) -> Sequence[Checkpoint]:
        """Return a tenant's checkpoints, or everybody's, or those of one session, oldest first."""

    def save_checkpoint(
        self, key: CheckpointKey, facts: Mapping[str, Json], snapshot: Snapshot
    ) -> Checkpoint:
        """Save a snapshot under a name; on stable storage when it returns.

        Raises:
            AlreadyStoredError: The name is taken.
            StorageFullError: There is no room. Nothing was changed.
            StorageFailedError: The disk has failed.
        """

    def load_checkpoint(self, key: CheckpointKey) -> tuple[Checkpoint, Snapshot]:
        """Return a checkpoint and what it holds.

        Raises:
            NotStoredError: There is none of this name.
            DamagedError: It is not what was saved.
        """

    def delete_checkpoint(self, key: CheckpointKey) -> None:
        """Delete a checkpoint.

        Raises:
            NotStoredError: There is none of this name.
            StorageFailedError: The disk has failed.
        """

    def close(self) -> None:
        """Let go of the data directory; the stores are closed before."""
