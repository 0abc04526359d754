"""Checkpoints: sessions as they were once, under names, on disk until somebody deletes them."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from optserve_server.core.actor import SessionActor
from optserve_server.core.capture import captured
from optserve_server.core.disk_quotas import snapshot_bytes
from optserve_server.core.durability import exhausted
from optserve_server.core.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    JournalForeignError,
    NoStorageError,
    SessionDamagedError,
    TooManyError,
)
from optserve_server.core.limits import Limits
from optserve_server.core.persistence import Persistence
from optserve_server.core.quotas import Quotas
from optserve_server.core.recovery import withheld_error
from optserve_server.core.spec_json import Read, SpecVersionError
from optserve_server.core.state import SessionState, StateVersionError, to_snapshot, to_state
from optserve_server.core.storage import (
    AlreadyStoredError,
    Checkpoint,
    CheckpointKey,
    DamagedError,
    Json,
    NotStoredError,
    Snapshot,
    StorageFullError,
    StorageVersionError,
    UnreadableError,
)
from optserve_server.core.surroundings import Surroundings
from optserve_server.core.tensors import byte_view
from optserve_server.core.work import to_its_end

_LOGGER = logging.getLogger(__name__)

VERSION = 1
"""Of the facts. A later version adds what an older reader must not pass over by a new number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint; the contract's Checkpoint says what each field means."""

    session_id: str
    name: str
    steps: int = 0
    epochs: int = 0
    optimizer: str = ""
    parameter_count: int = 0
    byte_count: int = 0
    created_s: float = 0.0
    torch: str = ""
    device: str = ""
    mark: str = ""
    """Differs from that of another state of the session."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A checkpoint in memory."""

    saved: Saved
    state: SessionState
    stepped_s: float | None
    """When the last step was applied, in seconds since the epoch."""


@dataclass(slots=True)
class _Tenant:
    """What a tenant has: as the disk, which nobody else writes to."""

    saved: dict[CheckpointKey, tuple[int, Saved]] = field(default_factory=dict)
    """The oldest first, each with its number."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by whoever changes it, so that what was counted is still so when it is saved."""
    is_read: bool = False


class Checkpoints:
    """Keeps the checkpoints of all tenants. Everything is called on the event loop."""

    def __init__(self, surroundings: Surroundings, quotas: Quotas, limits: Limits) -> None:
        """Keep them where the sessions of ``surroundings`` survive; read none yet.

        Args:
            surroundings: Of the sessions.
            quotas: For copies of sessions, and for what is read.
            limits: In force.
        """
        self._surroundings = surroundings
        self._quotas = quotas
        self._limits = limits
        self._tenants: dict[str, _Tenant] = {}
        self._numbers = itertools.count(1)

    async def load(self) -> None:
        """Count what tenants have on disk, if that is bounded."""
        if self._surroundings.persistence and self._limits.tenant_disk_bytes_max:
            storage = self._surroundings.persistence.storage
            for each in await self._surroundings.persistence.run(storage.checkpoints):
                self._quotas.disk.settle(each.key.tenant, each.key, each.bytes_on_disk)

    async def save(self, actor: SessionActor, name: str) -> Saved:
        """Save a session as it is between two steps; return what is on stable storage then.

        Once more, where nothing has changed since: return what is there.

        Raises:
            CheckpointExistsError: The session has one of this name, of another state.
            TooManyError: The tenant has as many as it may.
            SessionFailedError, SessionDeletedError: There is nothing to save.
            StorageExhaustedError: The disk has no room. Nothing was changed.
            NoStorageError: There is no disk.
        """
        self._persistence()
        with actor.in_use():
            return await to_its_end(actor.work.spawn(self._save(actor, name)))

    async def page(
        self, tenant: str, session_id: str, *, after: int, count: int
    ) -> tuple[Sequence[Saved], int | None]:
        """Return up to ``count`` of a tenant's checkpoints, later than the one numbered ``after``.

        Beside them stands the number to go on from; None if these were the last.

        Args:
            tenant: Whose they are.
            session_id: That they were saved of. Empty: of any.
            after: Number of the last one that is known. 0: none is.
            count: How many at most.

        Raises:
            NoStorageError: There is no disk.
        """
        found = (await self._read(tenant)).saved.values()
        later = [
            (number, saved)
            for number, saved in found
            if number > after and session_id in ("", saved.session_id)
        ]
        page = later[:count]
        return [saved for _, saved in page], page[-1][0] if len(later) > count else None

    @asynccontextmanager
    async def opened(self, tenant: str, session_id: str, name: str) -> AsyncIterator[Opened]:
        """Have a checkpoint in memory, which is reserved, for the time of a block.

        Raises:
            CheckpointNotFoundError: The tenant has none of this name.
            SessionDamagedError: It is not what was saved.
            JournalForeignError: A newer server saved it.
            MemoryExhaustedError: There is no room for it now.
            NoStorageError: There is no disk.
        """
        key = CheckpointKey(tenant=tenant, session_id=session_id, name=name)
        _, saved = (await self._read(tenant)).saved.get(key, (0, _unknown(key)))
        persistence = self._persistence()
        budget = self._quotas.of(tenant)
        with budget.reserved(saved.byte_count, what="the checkpoint", field="name"):
            yield await persistence.run(lambda: _open(persistence, key))

    async def delete(self, tenant: str, session_id: str, name: str) -> Saved:
        """Delete a checkpoint, and return what it was; of what is damaged no more than its name.

        Raises:
            CheckpointNotFoundError: The tenant has none of this name.
            NoStorageError: There is no disk.
        """
        key = CheckpointKey(tenant=tenant, session_id=session_id, name=name)
        return await to_its_end(asyncio.create_task(self._delete(key)))

    async def _save(self, actor: SessionActor, name: str) -> Saved:
        key = CheckpointKey(tenant=actor.opened.tenant, session_id=actor.session_id, name=name)
        own = await self._read(key.tenant)
        # In this order: whoever waits for a session keeps no other from being saved.
        budget = self._quotas.of(key.tenant)
        async with captured(actor, budget, what="a checkpoint") as state, own.lock:
            mark = await actor.work.run(lambda: _mark(state))
            if key in own.saved:
                return _same(own.saved[key][1], mark)
            self._check_count(len(own.saved))
            facts = _facts(state, mark, self._surroundings.clock())
            snapshot = to_snapshot(state, actor.about())
            try:
                saved = _decode(await self._store(key, facts, snapshot))
            except AlreadyStoredError:  # It is there, and cannot be read.
                raise _exists(name) from None
            except StorageFullError as error:
                raise exhausted(error) from None
            own.saved[key] = (next(self._numbers), saved)
        return saved

    async def _store(
        self, key: CheckpointKey, facts: Mapping[str, Json], snapshot: Snapshot
    ) -> Checkpoint:
        """Write a checkpoint, and count it for its tenant."""
        persistence, disk, count = self._persistence(), self._quotas.disk, 0
        disk.admit(key.tenant, key, snapshot_bytes(snapshot))
        try:
            stored = await persistence.run(
                lambda: persistence.storage.save_checkpoint(key, facts, snapshot)
            )
            count = stored.bytes_on_disk
        finally:
            disk.settle(key.tenant, key, count)
        return stored

    async def _delete(self, key: CheckpointKey) -> Saved:
        persistence = self._persistence()
        own = await self._read(key.tenant)
        async with own.lock:
            try:
                await persistence.run(lambda: persistence.storage.delete_checkpoint(key))
            except NotStoredError:
                raise _not_found() from None
            self._quotas.disk.settle(key.tenant, key, 0)
            _, saved = own.saved.pop(key, (0, _unknown(key)))
        return saved

    def _persistence(self) -> Persistence:
        if self._surroundings.persistence is None:
            raise NoStorageError(
                "this server keeps sessions in memory only, and no checkpoints: have it started"
                " with --data-dir"
            )
        return self._surroundings.persistence

    async def _read(self, tenant: str) -> _Tenant:
        """Return what a tenant has; read from disk once."""
        persistence = self._persistence()
        own = self._tenants.setdefault(tenant, _Tenant())
        if own.is_read:
            return own
        async with own.lock:
            if not own.is_read:
                for stored in await persistence.run(
                    lambda: persistence.storage.checkpoints(tenant)
                ):
                    own.saved[stored.key] = (next(self._numbers), _decode(stored))
                own.is_read = True
        return own

    def _check_count(self, count: int) -> None:
        most = self._limits.checkpoints_max
        if count >= most:
            raise TooManyError(
                f"there are {count} checkpoints, and {most} are allowed; delete some",
                field="name",
                expected=f"at most {most} checkpoints",
                actual=f"{count + 1} checkpoints",
            )


def _open(persistence: Persistence, key: CheckpointKey) -> Opened:
    try:
        stored, snapshot = persistence.storage.load_checkpoint(key)
        about: Read = snapshot.facts["about"]
        stepped_s = about["stepped_s"]
        return Opened(
            saved=_decode(stored),
            state=to_state(snapshot),
            stepped_s=None if stepped_s is None else float(stepped_s),
        )
    except NotStoredError:
        raise _not_found() from None
    except (StorageVersionError, StateVersionError, SpecVersionError) as error:
        raise JournalForeignError(
            "a newer version of the server saved the checkpoint; nothing is lost: start that one",
            field="name",
        ) from error
    except UnreadableError as error:
        raise withheld_error("checkpoint", error) from error
    except (DamagedError, LookupError, TypeError, ValueError) as error:
        raise _damaged(key, error) from error


def _facts(state: SessionState, mark: str, created_s: float) -> Mapping[str, Json]:
    """Return what the catalogue is to say of a checkpoint."""
    return {
        "version": VERSION,
        "steps": state.steps,
        "epochs": state.epochs,
        "optimizer": state.spec.optimizer.kind,
        "parameter_count": sum(each.element_count for each in state.spec.parameters),
        "created_s": created_s,
        "mark": mark,
    }


def _decode(stored: Checkpoint) -> Saved:
    """Return what the catalogue says; of what this version cannot read, that it is there."""
    facts: Read = stored.facts
    unknown = _unknown(stored.key, stored.bytes_on_disk)
    try:
        if facts["version"] > VERSION:
            return unknown
        return Saved(
            session_id=stored.key.session_id,
            name=stored.key.name,
            steps=int(facts["steps"]),
            epochs=int(facts["epochs"]),
            optimizer=str(facts["optimizer"]),
            parameter_count=int(facts["parameter_count"]),
            byte_count=stored.bytes_on_disk,
            created_s=float(facts["created_s"]),
            torch=stored.origin.torch,
            device=stored.origin.device,
            mark=str(facts["mark"]),
        )
    except (LookupError, TypeError, ValueError):
        return unknown


def _mark(state: SessionState) -> str:
    """Return what tells a state from the others that the session had, or has after a crash.

    The number of the last change does, but for changes that a crash has undone, and others that
    were made in their place: these have left something else. Takes as long as to read it.
    """
    snapshot = to_snapshot(state, {})
    checksum = zlib.crc32(json.dumps(snapshot.facts, sort_keys=True).encode())
    for _, tensor in sorted(snapshot.tensors.items()):
        checksum = zlib.crc32(byte_view(tensor), checksum)
    return f"{state.sequence} {checksum:08x}"


def _same(saved: Saved, mark: str) -> Saved:
    """Return a checkpoint that is asked for again.

    Raises:
        CheckpointExistsError: It is of another state.
    """
    if saved.mark != mark:
        raise _exists(saved.name)
    return saved


def _unknown(key: CheckpointKey, byte_count: int = 0) -> Saved:
    """Return what can be said of a checkpoint whose facts cannot be read."""
    return Saved(session_id=key.session_id, name=key.name, byte_count=byte_count)


def _damaged(key: CheckpointKey, error: Exception) -> SessionDamagedError:
    _LOGGER.error(
        "what is on disk of a checkpoint is not what was saved",
        extra={
            "session": key.session_id,
            "checkpoint": key.name,
            "cause": f"{type(error).__name__}: {error}",
        },
    )
    return SessionDamagedError(
        "what is on the server's disk of the checkpoint is not what was saved; it can only be"
        " deleted",
        field="name",
    )


def _exists(name: str) -> CheckpointExistsError:
    return CheckpointExistsError(
        "the session has a checkpoint of this name, of another state; choose another name, or"
        " delete that one",
        field="name",
        expected="a name that is free",
        actual=name,
    )


def _not_found() -> CheckpointNotFoundError:
    return CheckpointNotFoundError(
        "there is no checkpoint of this session and name; it was never saved, or was deleted",
        field="name",
        expected="the name of a checkpoint",
    )
