"""A durable session on disk: what is written of it, when, and what waits for that.

In mode JOURNAL every change is a record before it is made. In both modes snapshots are taken in the
background: the session is held for the copy of its state, and goes on while that is written.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from optserve_server.core import failpoints
from optserve_server.core.capture import Captured, captured
from optserve_server.core.changes import Change, to_record
from optserve_server.core.disk_quotas import Footprint, OverQuotaError
from optserve_server.core.errors import (
    OptserveError,
    SessionFailedError,
    StorageExhaustedError,
)
from optserve_server.core.events import SnapshotSaved
from optserve_server.core.limits import Limits
from optserve_server.core.persistence import Persistence
from optserve_server.core.quotas import TenantBudget
from optserve_server.core.spec import DurabilityMode
from optserve_server.core.state import SessionState, to_snapshot
from optserve_server.core.storage import (
    Json,
    SessionStore,
    StorageError,
    StorageFailedError,
    StorageFullError,
)
from optserve_server.core.surroundings import Surroundings
from optserve_server.core.work import to_its_end

_LOGGER = logging.getLogger(__name__)

_RECORDS_BETWEEN = 3  # One is written while the snapshot begins, one may wait, one is its end.
_RETRY_AFTER_S = 5.0  # Room on a disk is made by people.


class Kept(Captured, Protocol):
    """Whoever serves the session, as far as it is asked here."""

    def facts(self) -> Mapping[str, Json]:
        """Return what the catalogue says of the session."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mark:
    """A point in the life of a session."""

    sequence: int
    steps: int


class Archive:
    """One durable session on disk. Everything but record() is called on the event loop."""

    def __init__(
        self,
        kept: Kept,
        store: SessionStore,
        *,
        saved_steps: int,
        persistence: Persistence,
        surroundings: Surroundings,
        budget: TenantBudget,
        footprint: Footprint,
        limits: Limits,
    ) -> None:
        """Keep a session, which is where its store is; nobody else may write to that.

        Args:
            kept: Serves the session.
            store: Holds it already.
            saved_steps: How many steps its last snapshot contains.
            persistence: Where the disk's work is done.
            surroundings: Of the session.
            budget: For the copies of the session's state.
            footprint: For what is written.
            limits: For the size of the journal.
        """
        self.durability = kept.session.spec.durability
        self.journals = self.durability.mode is DurabilityMode.JOURNAL
        """Whether every change is written down."""
        self._kept = kept
        self._session = kept.session
        self._store = store
        self._persistence = persistence
        self._surroundings = surroundings
        self._budget = budget
        self._footprint = footprint
        self._journal_bytes_max = limits.journal_bytes_max
        # Of the last snapshot, and of the one that is being written.
        self._saved = self._begun = _Mark(sequence=store.snapshot_sequence, steps=saved_steps)
        # Of the journal: each is counted by one thread at a time.
        self._recorded_bytes = self._reported_bytes = store.journal_bytes
        self._begun_bytes = self._saved_bytes = 0
        self._record_bytes = 0  # Of the last record.
        self._kept_steps = kept.session.steps  # As far as is known.
        self._syncing: Future[None] | None = None
        self._saving: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._resting = False  # After a snapshot that failed: the next one has its time.
        self._loop = asyncio.get_running_loop()
        self._closed = False
        # A snapshot is begun so early that its end is in time, too: see admit().
        steps = self.durability.snapshot_steps
        self._due_steps = steps if self.journals else (steps + 1) // 2
        if self.journals:
            self._session.recorder = self.record

    def durable_steps(self, steps: int) -> int:
        """Return how many of the ``steps`` that were acknowledged a crash now would leave."""
        if not self.journals:
            return self._saved.steps
        # Whether a step that the disk failed in is there, nobody knows before a restart.
        return min(steps, self._kept_steps) if self._session.failed else steps

    @property
    def is_saved(self) -> bool:
        """Whether the session as it is now is in a snapshot, or has failed and cannot be."""
        return self._session.failed or self._saved.sequence == self._session.sequence

    @property
    def takes_steps_at_once(self) -> bool:
        """Whether a step may be made on the event loop: nothing is written, or waited for."""
        return not (self.journals or self._is_behind)

    def record(self, change: Change, sequence: int) -> None:
        """Write down a change that is about to be made; see session.Recorder. In a thread.

        Raises:
            StorageExhaustedError: The disk has no room.
            SessionFailedError: The disk has failed.
        """
        record = to_record(change, sequence, self._surroundings.clock())
        failpoints.reach("change-unrecorded")
        try:
            with self._footprint.recording(record):
                byte_count = self._store.append(record)
        except StorageFullError as error:
            raise exhausted(error) from None
        except StorageFailedError as error:
            raise self._lost(error) from None
        self._recorded_bytes += byte_count
        self._record_bytes = byte_count
        failpoints.reach("change-recorded")
        if self.durability.fsync:
            self._syncing = self._store.commit()  # While the change is made.

    async def make(self, change: Callable[[], object]) -> None:
        """Make a change, in a thread, to the session, which is held alone; return once it is kept.

        A call that is cancelled meanwhile ends when it is.

        Raises:
            OptserveError: The change was refused, or cannot be written down. Nothing was changed.
            SessionFailedError: Whether it was kept is unknown.
        """
        await to_its_end(self._kept.work.spawn(self._make(change)))

    async def admit(self) -> None:
        """Wait, before a step, while more could be lost than was agreed, or replayed than is good.

        Raises:
            StorageExhaustedError: The disk has no room for the snapshot that is missing.
            SessionFailedError: The disk has failed.
        """
        while self._is_behind and not (self._closed or self._session.failed):
            await self.save()

    def changed(self, *, at_once: bool = False) -> None:
        """Note that the session has changed; begin a snapshot if it is time, or ``at_once``."""
        if self._saving or self._resting or self._closed or self._session.failed:
            return
        unsaved_steps = self._session.steps - self._begun.steps
        # A snapshot makes up for the journal before it only with the next one: room must be left
        # for what comes between them.
        room = self._footprint.free_bytes - _RECORDS_BETWEEN * self._record_bytes
        full = 0 < self._unsaved_bytes >= min(self._journal_bytes_max, room)
        if at_once or full or unsaved_steps >= self._due_steps:
            self._begin()
        elif self._timer is None and self._session.sequence > self._begun.sequence:
            self._timer = self._loop.call_later(self.durability.snapshot_s, self._begin)

    async def save(self) -> None:
        """Have the session as it is now in a snapshot.

        Raises:
            StorageExhaustedError: The disk has no room.
            SessionFailedError: The disk has failed.
        """
        wanted = self._session.sequence
        while self._saved.sequence < wanted and not (self._closed or self._session.failed):
            saving = self._begin()
            try:
                await asyncio.shield(saving)
            except StorageFullError as error:
                raise exhausted(error) from None
            except StorageError as error:
                raise SessionFailedError(
                    "the server's disk has failed, and no longer takes what the session has"
                ) from error

    def stop(self) -> None:
        """Begin no more snapshots: the session is about to leave the memory."""
        self._closed = True
        self._stop_timer()

    async def settle(self) -> None:
        """Write what has not been written, as far as that can be, and close."""
        with suppress(Exception):  # It has been logged; what was saved before is there.
            await self.save()  # A journal too: what runs next may not be able to replay it.
        await self.close()

    async def close(self) -> None:
        """Write no more, and let go of the files; what was written is on stable storage then."""
        self.stop()
        self._session.recorder = None
        if self._saving:
            await asyncio.wait([self._saving])
        try:
            await self._persistence.run(self._store.close)
        except StorageError as error:
            self._log("the disk has failed", error)

    @property
    def _unsaved_bytes(self) -> int:
        return self._recorded_bytes - self._saved_bytes

    @property
    def _is_behind(self) -> bool:
        if self._saved.sequence == self._session.sequence:  # However many bytes are counted.
            return False
        if self.journals:
            return self._unsaved_bytes >= 2 * self._journal_bytes_max
        return self._session.steps - self._saved.steps >= self.durability.snapshot_steps

    async def _make(self, change: Callable[[], object]) -> None:
        observer, monotonic = self._surroundings.observer, self._surroundings.monotonic
        await self._kept.work.run(change)
        failpoints.reach("change-made")
        syncing, self._syncing = self._syncing, None
        if syncing:
            started_s = monotonic()
            try:
                await asyncio.wrap_future(syncing)
            except StorageFailedError as error:
                raise self._lost(error) from None
            observer.journal_synced(monotonic() - started_s)
        self._kept_steps = self._session.steps
        observer.journal_written(self._recorded_bytes - self._reported_bytes)
        self._reported_bytes = self._recorded_bytes

    def _begin(self) -> asyncio.Task[None]:
        """Begin a snapshot, unless one is being written; return what ends with it."""
        self._stop_timer()
        self._resting = False
        if self._saving is None:
            self._saving = self._kept.work.spawn(self._save())
            self._saving.add_done_callback(self._ended)
        return self._saving

    async def _save(self) -> None:
        started_s = self._surroundings.monotonic()
        async with captured(self._kept, self._budget, what="a snapshot") as state:
            # At once: the session may go on, and letting go of it does not wait.
            self._begun = _Mark(sequence=state.sequence, steps=state.steps)
            self._begun_bytes = self._recorded_bytes
            await self._write(state)
        self._saved = _Mark(sequence=state.sequence, steps=state.steps)
        self._saved_bytes = self._begun_bytes
        seconds = self._surroundings.monotonic() - started_s
        self._surroundings.observer.snapshot_saved(
            SnapshotSaved(seconds=seconds, time_s=self._surroundings.clock())
        )

    async def _write(self, state: SessionState) -> None:
        about, facts = self._kept.about(), self._kept.facts()

        def write() -> None:
            snapshot = to_snapshot(state, about)
            with self._footprint.saving(snapshot):
                self._store.save_snapshot(snapshot)
                self._store.update_facts(facts)

        await self._persistence.run(write)

    def _ended(self, saving: asyncio.Task[None]) -> None:
        self._saving = None
        error = None if saving.cancelled() else saving.exception()
        if error is None:
            self.changed()
            return
        self._begun = self._saved  # It is to be done again.
        if isinstance(error, OptserveError):  # The session has failed, or was deleted.
            return
        self._log("a snapshot cannot be saved", error)
        self._surroundings.observer.snapshot_failed()
        if not self._closed:
            wait_s = max(self.durability.snapshot_s, _RETRY_AFTER_S)
            # Who has deleted something need not wait; and nothing was written.
            self._resting = not isinstance(error, OverQuotaError)
            self._timer = self._loop.call_later(wait_s, self._begin)

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _lost(self, error: StorageError) -> SessionFailedError:
        """Give the session up: what the disk has of it is unknown until it is read again."""
        self._session.failed = True
        self._log("the disk has failed", error)
        return SessionFailedError(
            "the server's disk has failed; whether the change was kept is known when the server has"
            " been restarted"
        )

    def _log(self, what: str, error: BaseException) -> None:
        _LOGGER.error(what, extra={"session": self._store.session_id, "cause": str(error)})


def exhausted(error: StorageFullError, field: str = "session_id") -> StorageExhaustedError:
    """Return what a change is refused with that the disk has no room for.

    Args:
        error: What the disk said, for the log.
        field: Path of what asks for the room.
    """
    _LOGGER.warning("the disk has no room", extra={"cause": str(error)})
    if isinstance(error, OverQuotaError):
        return StorageExhaustedError(
            f"{error}; nothing was changed: delete sessions or checkpoints, or try again later",
            field=field,
            expected=f"at most {error.free} bytes",
            actual=f"{error.count} bytes",
            retry_after_s=_RETRY_AFTER_S,
        )
    return StorageExhaustedError(
        "the server's disk has no room for what would make the change durable; nothing was changed:"
        " try again once there is room",
        field=field,
        expected="room on the server's disk",
        retry_after_s=_RETRY_AFTER_S,
    )
