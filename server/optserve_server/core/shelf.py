"""Durable sessions on disk: those that are not in memory, and the way there and back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from optserve_server.core.actor import SessionActor
from optserve_server.core.catalogue import ParkedSession
from optserve_server.core.creations import CreationRequest
from optserve_server.core.disk_quotas import Footprint, snapshot_bytes
from optserve_server.core.durability import Archive, exhausted
from optserve_server.core.errors import NoStorageError, SessionDamagedError
from optserve_server.core.limits import Limits
from optserve_server.core.persistence import Persistence
from optserve_server.core.quotas import Quotas
from optserve_server.core.recovery import (
    damaged_error,
    disk_failed_error,
    newer_error,
    recover,
    tell_damage,
    withheld_error,
)
from optserve_server.core.state import to_snapshot
from optserve_server.core.storage import (
    NotStoredError,
    SessionStore,
    Storage,
    StorageError,
    StorageFailedError,
    StorageFullError,
    StoredSession,
    UnreadableError,
)
from optserve_server.core.surroundings import Surroundings
from optserve_server.core.work import to_its_end

_LOGGER = logging.getLogger(__name__)


class Shelf:
    """Keeps durable sessions. Everything is called on the event loop."""

    def __init__(
        self, persistence: Persistence, surroundings: Surroundings, quotas: Quotas, limits: Limits
    ) -> None:
        """Keep them in ``persistence``; none is known before load().

        Args:
            persistence: Where they lie.
            surroundings: What those in memory have around them.
            quotas: For the copies that snapshots take.
            limits: In force.
        """
        self._persistence = persistence
        self._surroundings = surroundings
        self._quotas = quotas
        self._limits = limits
        self._parked: dict[str, ParkedSession] = {}

    @property
    def parked(self) -> Mapping[str, ParkedSession]:
        """The sessions that lie on disk only, by their ids."""
        return MappingProxyType(self._parked)

    async def load(self) -> Sequence[ParkedSession]:
        """Find the sessions that lie on disk; return them, the oldest first."""
        stored = await self._persistence.run(self._persistence.storage.sessions)
        for each in stored:
            if each.damage:
                tell_damage(each.session_id, each.damage)
            parked = ParkedSession(each, self._surroundings.monotonic)
            self._parked[each.session_id] = parked
            self._quotas.disk.settle(parked.opened.tenant, each.session_id, each.bytes_on_disk)
        self._tell()
        return list(self._parked.values())

    async def put(self, actor: SessionActor, request: CreationRequest | None) -> None:
        """Put a new session on disk, whole or not at all, and keep it there from now on.

        Raises:
            StorageExhaustedError: There is no room.
            SessionFailedError: The disk has failed.
        """
        actor.request = request
        session, storage = actor.session, self._persistence.storage
        tenant, disk = actor.opened.tenant, self._quotas.disk
        state, about, facts = session.capture(copy=False), actor.about(), actor.facts()

        def create() -> tuple[SessionStore, int]:
            snapshot = to_snapshot(state, about)
            disk.admit(tenant, actor.session_id, snapshot_bytes(snapshot))
            store = storage.create(actor.session_id, facts, snapshot)
            try:
                return store, store.kept_bytes
            except BaseException:
                _destroy(storage, store)
                raise

        creating = actor.work.spawn(self._persistence.run(create))
        try:
            store, kept_bytes = await to_its_end(creating)
        except BaseException as error:
            # If it was cancelled, the client has gone, and nobody else knows the id.
            if creating.done() and not creating.cancelled() and creating.exception() is None:
                await self._persistence.run(lambda: _destroy(storage, creating.result()[0]))
            disk.settle(tenant, actor.session_id, 0)
            if isinstance(error, StorageFullError):
                raise exhausted(error, "durability") from None
            if isinstance(error, StorageFailedError):
                told = "; no session was created"
                raise disk_failed_error(told, error, session=actor.session_id) from error
            raise
        self._keep(actor, store, kept_bytes, saved_steps=session.steps)

    async def take(self, parked: ParkedSession, reserved_bytes: int) -> SessionActor:
        """Bring a session back into memory, ``reserved_bytes`` of which are reserved for it.

        Raises:
            OutgrownError: It needs more by now. Nothing was changed.
            SessionDamagedError, JournalForeignError: It cannot come back.
            SessionFailedError: The disk has failed.
        """
        if parked.damaged:
            raise damaged_error()
        if parked.is_newer:
            raise newer_error()
        started_s = self._surroundings.monotonic()
        device, limits, persistence = self._surroundings.device, self._limits, self._persistence
        try:
            recovered = await persistence.run(
                lambda: recover(
                    parked.session_id, persistence, device, limits, reserved_bytes=reserved_bytes
                )
            )
        except SessionDamagedError:
            parked.damaged = True
            raise
        except (NotStoredError, StorageFailedError, UnreadableError) as error:
            raise withheld_error("session", error, session=parked.session_id) from error
        actor = SessionActor(
            recovered.session,
            parked.opened,
            reserved_bytes,
            self._quotas.of(parked.opened.tenant),
            self._surroundings,
        )
        elapsed_s = self._surroundings.monotonic() - started_s
        self._surroundings.observer.session_restored(elapsed_s)
        _LOGGER.info(
            "session restored",
            extra={
                "session": parked.session_id,
                "steps": recovered.session.steps,
                "replayed": recovered.session.steps - recovered.saved_steps,
                "seconds": round(elapsed_s, 3),
            },
        )
        actor.created_s = parked.standing().created_s
        actor.stepped_s = recovered.stepped_s
        actor.request = parked.request
        archive = self._keep(
            actor, recovered.store, recovered.kept_bytes, saved_steps=recovered.saved_steps
        )
        # What was made of a foreign journal must not be made of it once more, elsewhere.
        archive.changed(at_once=recovered.is_foreign)
        del self._parked[parked.session_id]
        self._tell()
        return actor

    async def park(self, actor: SessionActor, leaving: Coroutine[Any, Any, None]) -> None:
        """Have a session, which is in a snapshot, on disk only.

        Args:
            actor: Serves it; found by nobody any more.
            leaving: Takes it out of memory.
        """
        parked = self._lay(actor)
        await parked.moved(lambda: self._left(actor, leaving))

    async def remove(
        self, actor: SessionActor, leaving: Coroutine[Any, Any, None], gone: Callable[[], None]
    ) -> None:
        """Take a session out of memory, and delete it; until that is done, it is a parked one.

        Args:
            actor: Serves it; found by nobody any more.
            leaving: Takes it out of memory.
            gone: Called once nothing is left of it.

        Raises:
            SessionFailedError: The disk has failed; the session stays parked.
        """
        parked = self._lay(actor)

        async def remove() -> None:
            await self._left(actor, leaving)
            await self._delete(parked, gone)

        await parked.moved(remove)

    async def discard(self, parked: ParkedSession, gone: Callable[[], None]) -> None:
        """Delete a session that lies on disk only; see remove()."""
        await parked.moved(lambda: self._delete(parked, gone))

    def _lay(self, actor: SessionActor) -> ParkedSession:
        """Note that a session is on its way to lie on disk only."""
        stored = StoredSession(
            session_id=actor.session_id, facts=actor.facts(), sequence=0, bytes_on_disk=0
        )
        parked = ParkedSession(stored, self._surroundings.monotonic)
        self._parked[actor.session_id] = parked
        self._tell()
        return parked

    async def _left(self, actor: SessionActor, leaving: Coroutine[Any, Any, None]) -> None:
        """Wait until a session has left memory, and writes nothing any more."""
        await leaving
        if actor.archive:
            await actor.archive.close()

    async def _delete(self, parked: ParkedSession, gone: Callable[[], None]) -> None:
        session_id, storage = parked.session_id, self._persistence.storage
        try:
            with suppress(NotStoredError):  # When it was deleted before, what came next failed.
                await self._persistence.run(lambda: storage.delete(session_id))
        except StorageError as error:
            told = "; it may keep the session: delete it again later"
            raise disk_failed_error(told, error, session=session_id) from error
        del self._parked[session_id]
        self._tell()
        self._quotas.disk.settle(parked.opened.tenant, session_id, 0)
        gone()

    def _keep(
        self, actor: SessionActor, store: SessionStore, kept_bytes: int, *, saved_steps: int
    ) -> Archive:
        tenant = actor.opened.tenant
        archive = Archive(
            actor,
            store,
            saved_steps=saved_steps,
            persistence=self._persistence,
            surroundings=self._surroundings,
            budget=self._quotas.of(tenant),
            footprint=Footprint(
                self._quotas.disk,
                tenant,
                store,
                kept_bytes=kept_bytes,
                state_bytes=actor.session.byte_count,
            ),
            limits=self._limits,
        )
        actor.keep(archive)
        return archive

    def _tell(self) -> None:
        self._surroundings.observer.sessions_parked(len(self._parked))


def no_storage_error() -> NoStorageError:
    """Return what durability is refused with where there is none."""
    return NoStorageError(
        "this server keeps sessions in memory only: leave durability unset, or have the server"
        " started with --data-dir",
        field="durability.mode",
        expected="NONE",
    )


def _destroy(storage: Storage, store: SessionStore) -> None:
    store.close()
    storage.delete(store.session_id)
