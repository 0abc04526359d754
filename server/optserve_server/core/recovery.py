"""From what lies on disk of a session to the session: its snapshot, and every change since."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from optserve_server.core.admission import session_bytes
from optserve_server.core.changes import replay
from optserve_server.core.device import Device
from optserve_server.core.errors import (
    JournalForeignError,
    OptserveError,
    SessionDamagedError,
    SessionFailedError,
)
from optserve_server.core.history import POINT_BYTES
from optserve_server.core.limits import Limits
from optserve_server.core.persistence import Persistence
from optserve_server.core.session import Session
from optserve_server.core.spec import DurabilityMode, SessionSpec
from optserve_server.core.spec_json import Read, SpecVersionError
from optserve_server.core.state import StateVersionError, to_state
from optserve_server.core.storage import (
    DamagedError,
    Loaded,
    Record,
    RecordKind,
    SessionStore,
    SkippedSnapshot,
    Snapshot,
    StorageError,
    StorageVersionError,
    UnreadableError,
)

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """A session that has come back."""

    session: Session
    store: SessionStore
    kept_bytes: int
    """What it has on disk beside the journal."""
    saved_steps: int
    """Steps that its snapshot contains."""
    stepped_s: float | None
    """When the last step was applied, in seconds since the epoch."""
    is_foreign: bool
    """Whether something else has written its journal."""


class OutgrownError(Exception):
    """A session has grown since its room was noted: it comes back once it has ``byte_count``."""

    def __init__(self, byte_count: int) -> None:
        """Say how much memory it needs, as far as it has been read."""
        super().__init__(f"the session needs {byte_count} bytes")
        self.byte_count = byte_count


class _Room:
    """The memory that is reserved for a session, which must do for all that it becomes.

    What is read, one record at a time, has the room of the gradients, of which none come yet.
    """

    def __init__(self, reserved_bytes: int, device: torch.device) -> None:
        self._reserved_bytes = reserved_bytes
        self._device = device
        self._spec: SessionSpec | None = None
        self._spec_bytes = 0

    def check(self, spec: SessionSpec, history_bytes: int) -> None:
        """Make sure that there is as much as ``spec`` takes, and the points of the history.

        Raises:
            OutgrownError: There is not.
        """
        if spec is not self._spec:  # As after few changes.
            self._spec, self._spec_bytes = spec, session_bytes(spec, self._device)
        byte_count = self._spec_bytes + history_bytes
        if byte_count > self._reserved_bytes:
            raise OutgrownError(byte_count)


def recover(
    session_id: str,
    persistence: Persistence,
    device: Device,
    limits: Limits,
    *,
    reserved_bytes: int,
) -> Recovered:
    """Bring a session back from disk. Takes as long as its changes since the last snapshot took.

    Args:
        session_id: Whose.
        persistence: Where it is.
        device: Where it will be.
        limits: In force.
        reserved_bytes: How much memory it may take.

    Raises:
        OutgrownError: It takes more than that. It is on disk as before.
        SessionDamagedError: What is there is not what was written there.
        JournalForeignError: Another torch, another device or a newer server wrote it.
        StorageError: The disk does not give it back. It is on disk as before.
    """
    store = persistence.storage.open(session_id)
    try:
        return _recover(store, persistence, device, limits, _Room(reserved_bytes, device.torch))
    except BaseException:
        store.close()
        raise


def _recover(
    store: SessionStore, persistence: Persistence, device: Device, limits: Limits, room: _Room
) -> Recovered:
    try:
        loaded = store.load()
        _check_origin(loaded, persistence)
        records, origins, skipped = loaded.records, loaded.origins, loaded.skipped
        session, stepped_s = _restored(loaded.snapshot, device, limits, room)
        del loaded  # The values of the snapshot are in the room of the records.
        saved_steps = session.steps
        stepped_s = _replay(session, records, stepped_s, room)
    except (StorageVersionError, StateVersionError, SpecVersionError) as error:
        raise newer_error() from error
    except (UnreadableError, JournalForeignError):  # No damage, and no reason to delete it.
        raise
    except (DamagedError, LookupError, TypeError, ValueError, OptserveError) as error:
        raise _damaged(store.session_id, error) from error
    _check_skipped(skipped, session, store.session_id)
    return Recovered(
        session=session,
        store=store,
        kept_bytes=store.kept_bytes,
        saved_steps=saved_steps,
        stepped_s=stepped_s,
        is_foreign=bool(origins - {persistence.origin}),
    )


def _restored(
    snapshot: Snapshot, device: Device, limits: Limits, room: _Room
) -> tuple[Session, float | None]:
    """Return the session of a snapshot, and when its last step was made."""
    state = to_state(snapshot)
    room.check(state.spec, POINT_BYTES * len(state.history.points))
    about: Read = snapshot.facts["about"]
    return Session.restored(state, device, limits), about["stepped_s"]


def _replay(
    session: Session, records: Iterable[Record], stepped_s: float | None, room: _Room
) -> float | None:
    """Make all changes again; return when the last step was made first, ``stepped_s`` if none was.

    A last step that torch fails in, as it did then, was not acknowledged: the session comes back
    failed, as it was.

    Raises:
        OutgrownError: A change has made the session larger than its room.
        Exception: As of replay(). A step that had been made, and fails now, is this server's
            trouble and not the session's.
    """
    failure: Exception | None = None
    for record in records:
        is_step = record.kind is RecordKind.STEP
        if failure and is_step:
            raise failure
        try:
            time_s = replay(session, record)
        except Exception as error:
            if failure or not session.failed:
                raise
            _LOGGER.exception("a step fails again", extra={"record": record.sequence})
            failure = error
        else:
            stepped_s = time_s if is_step else stepped_s
        room.check(session.spec, session.history.byte_count)
        del record  # Its memory is the next one's.
    return stepped_s


def _check_origin(loaded: Loaded, persistence: Persistence) -> None:
    """Make sure that the journal may be replayed here: others may make other bits of it."""
    foreign = loaded.origins - {persistence.origin}
    if foreign and not persistence.replay_foreign:
        wrote = ", ".join(sorted(f"torch {each.torch} on {each.device}" for each in foreign))
        here = f"torch {persistence.origin.torch} on {persistence.origin.device}"
        raise JournalForeignError(
            f"the session's journal was written with {wrote}; here is {here}, which may make other"
            " bits of it. Nothing is lost: start the server that wrote it, or this one with"
            " --replay-foreign-journals",
            field="session_id",
            expected=wrote,
            actual=here,
        )


def _check_skipped(skipped: Sequence[SkippedSnapshot], session: Session, session_id: str) -> None:
    """Make sure that the journal makes up for snapshots that are damaged.

    Without a journal an older snapshot is all that there is: the session goes on from there.

    Raises:
        SessionDamagedError: The journal does not.
        UnreadableError: It is a newer one that the disk cannot read, perhaps for now only.
    """
    for each in skipped:
        if session.sequence >= each.sequence:
            continue
        if isinstance(each.damage, UnreadableError):
            raise each.damage
        if session.spec.durability.mode is DurabilityMode.JOURNAL:
            raise _damaged(session_id, each.damage) from each.damage
        _LOGGER.error(
            "a snapshot is damaged; the session goes on from the one before it",
            extra={"session": session_id, "steps": session.steps, "cause": str(each.damage)},
        )


def _damaged(session_id: str, error: Exception) -> SessionDamagedError:
    tell_damage(session_id, error)
    return damaged_error()


def tell_damage(session_id: str, error: Exception) -> None:
    """Tell the operator what is damaged, and where."""
    _LOGGER.error(
        "what is on disk of a session is not what was written there",
        extra={"session": session_id, "cause": f"{type(error).__name__}: {error}"},
    )


def newer_error() -> JournalForeignError:
    """Return what a session is refused with that only a newer server can bring back."""
    return JournalForeignError(
        "a newer version of the server wrote the session; nothing is lost: start that one",
        field="session_id",
    )


def withheld_error(what: str, error: StorageError, **where: str) -> SessionFailedError:
    """Return what is told of what the disk does not give back; see disk_failed_error()."""
    told = f", and does not give the {what} back; nothing has been changed"
    return disk_failed_error(told, error, **where)


def disk_failed_error(told: str, error: StorageError, **where: str) -> SessionFailedError:
    """Log that the disk has failed; return what its client is told, who may try again.

    Args:
        told: To the client, after that.
        error: Of the disk.
        where: For the log.
    """
    _LOGGER.error("the disk has failed", extra={**where, "cause": str(error)})
    return SessionFailedError(f"the server's disk has failed{told}")


def damaged_error() -> SessionDamagedError:
    """Return what a session is refused with that cannot come back."""
    return SessionDamagedError(
        "what is on the server's disk of the session is not what was written there; the session can"
        " only be deleted",
        field="session_id",
    )
