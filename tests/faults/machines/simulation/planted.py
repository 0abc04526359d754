"""Bugs that one could make, planted to see whether the simulation finds them.

Each takes the place of something that the server does right, for as long as a block runs.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

from faults.disks import MemoryDisk, MemoryFile
from faults.machines.simulation.scene import Promise
from torch import Tensor

from optserve_server.core import changes, checkpoints, durability, recovery, rounds, session
from optserve_server.core.changes import Change, SpecChange
from optserve_server.core.creations import CreationRequest, Creations
from optserve_server.core.device import Device
from optserve_server.core.durability import Archive
from optserve_server.core.errors import RoundTimeoutError
from optserve_server.core.limits import Limits
from optserve_server.core.outcome import StepOutcome
from optserve_server.core.quotas import Quotas
from optserve_server.core.round import Contribution, Round
from optserve_server.core.rounds import Rounds
from optserve_server.core.seats import Seats
from optserve_server.core.session import Session
from optserve_server.core.state import SessionState, to_snapshot
from optserve_server.core.storage import Json, Loaded, Record, RecordKind, Snapshot
from optserve_server.storage.commits import Commits, Committing
from optserve_server.storage.reader import JournalReader
from optserve_server.storage.store import LocalSessionStore

_DISK = (Promise.SNAPSHOT, Promise.JOURNAL, Promise.FSYNC)
_RECORDS = (Promise.JOURNAL, Promise.FSYNC)
_POWER = (Promise.FSYNC,)
_OPERATED = (Promise.NONE, Promise.JOURNAL, Promise.FSYNC)


def _forget_the_digest() -> AbstractContextManager[object]:
    """Take whatever comes with the number of a step that was made for its repeat."""
    return patch.object(Contribution, "check_digest", lambda _self: None)


def _do_not_keep_the_digest() -> AbstractContextManager[object]:
    """Apply a step, and note no digests beside it."""
    right = Session.step

    def step(
        self: Session, gradients: Sequence[Tensor | None], digests: Sequence[bytes]
    ) -> StepOutcome:
        return right(self, gradients, [b""] * len(digests))

    return patch.object(Session, "step", step)


def _apply_a_repeat() -> AbstractContextManager[object]:
    """Take a repeat of the last step for the next one."""
    right = Rounds.begin

    def begin(
        self: Rounds, worker: int, step: int, positions: Sequence[int] | None, digest: bytes = b""
    ) -> Contribution:
        return right(self, worker, max(step, self._round.step), positions, digest)

    return patch.object(Rounds, "begin", begin)


def _forget_who_waits() -> AbstractContextManager[object]:
    """Let a contribution that waits be written over by what the worker sends next."""
    return patch.object(Round, "has", lambda _self, _worker: False)


def _drop_what_timed_out() -> AbstractContextManager[object]:
    """Let a contribution go when its call has waited for too long."""
    right = Rounds.commit

    async def commit(self: Rounds, contribution: Contribution) -> tuple[StepOutcome, bool]:
        round_ = self._round
        try:
            return await right(self, contribution)
        except RoundTimeoutError:
            round_._contributions[contribution.worker] = None
            raise

    return patch.object(Rounds, "commit", commit)


def _add_in_another_order() -> AbstractContextManager[object]:
    """Add the workers' gradients from the last worker to the first."""
    right = Round.mean

    def mean(self: Round, *, into: Sequence[Tensor] = ()) -> list[Tensor | None]:
        self._contributions.reverse()
        return right(self, into=into)

    return patch.object(Round, "mean", mean)


def _apply_what_is_not_finite() -> AbstractContextManager[object]:
    """Do not look whether gradients are finite: neither one worker's, nor their mean."""
    stack = ExitStack()
    for module in (rounds, session):
        stack.enter_context(patch.object(module, "check_finite", lambda *_arguments: None))
    return stack


def _share_a_seat() -> AbstractContextManager[object]:
    """Give a seat away without waiting until the call that has it has left."""

    async def vacate(self: Seats, worker: int, client_id: bytes) -> None:
        seat = self._held.get(worker)
        if client_id and seat and seat.client_id == client_id:
            del self._held[worker]

    return patch.object(Seats, "vacate", vacate)


def _make_a_session_for_each_request() -> AbstractContextManager[object]:
    """Do not know a request for a session again."""

    async def once(
        _self: Creations,
        _request: CreationRequest,
        create: Callable[[], Coroutine[Any, Any, str]],
    ) -> str:
        return await create()

    return patch.object(Creations, "once", once)


def _keep_the_memory() -> AbstractContextManager[object]:
    """Do not give back what was reserved."""
    return patch.object(Quotas, "release", lambda _self, _tenant, _count: None)


def _skip_the_fsync() -> AbstractContextManager[object]:
    """Say that what was appended is on stable storage, and let the system decide when it is."""

    def submit(_self: Commits, _journal: Committing) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done

    return patch.object(Commits, "submit", submit)


def _acknowledge_before_the_write() -> AbstractContextManager[object]:
    """Write a change down when the next one comes."""
    right, held = Archive.record, WeakKeyDictionary[Archive, tuple[Change, int]]()

    def record(self: Archive, change: Change, sequence: int) -> None:
        before = held.get(self)
        held[self] = (change, sequence)
        if before:
            right(self, *before)

    return patch.object(Archive, "record", record)


def _acknowledge_before_the_sync() -> AbstractContextManager[object]:
    """Answer while the disk is still busy."""
    right = Archive.record

    def record(self: Archive, change: Change, sequence: int) -> None:
        right(self, change, sequence)
        self._syncing = None

    return patch.object(Archive, "record", record)


def _leave_names_unsynced() -> AbstractContextManager[object]:
    """Do not sync directories."""
    return patch.object(MemoryDisk, "sync_directory", lambda _self, _path: None)


def _prune_too_early() -> AbstractContextManager[object]:
    """Remove the journal that a snapshot makes good before the snapshot is there."""
    right = LocalSessionStore.save_snapshot

    def save_snapshot(self: LocalSessionStore, snapshot: Snapshot) -> None:
        self._journal.prune(after=snapshot.sequence)
        right(self, snapshot)

    return patch.object(LocalSessionStore, "save_snapshot", save_snapshot)


def _forget_digests_on_disk() -> AbstractContextManager[object]:
    """Write a step down without what identifies it."""
    right = changes.to_record

    def to_record(change: Change, sequence: int, time_s: float) -> Record:
        record = right(change, sequence, time_s)
        if "digests" not in record.facts:
            return record
        count = len(record.facts["digests"])  # type: ignore[arg-type] # A list.
        return replace(record, facts={**record.facts, "digests": [""] * count})

    return patch.object(durability, "to_record", to_record)


def _forget_momenta_on_disk() -> AbstractContextManager[object]:
    """Leave what the optimizer keeps out of snapshots."""
    right = Session.capture

    def capture(self: Session, **arguments: bool) -> SessionState:
        return replace(right(self, **arguments), optimizer_state={})

    return patch.object(Session, "capture", capture)


def _replay_less() -> AbstractContextManager[object]:
    """Leave out the last record at a restart."""
    right = LocalSessionStore.load

    def load(self: LocalSessionStore) -> Loaded:
        loaded = right(self)
        return replace(loaded, records=iter(list(loaded.records)[:-1]))

    return patch.object(LocalSessionStore, "load", load)


def _leave_half_a_record() -> AbstractContextManager[object]:
    """Read past what a crash has left unfinished, and leave it where it is."""
    right = JournalReader._cut

    def cut(self: JournalReader, *arguments: Any) -> None:
        with patch.object(MemoryFile, "truncate", lambda _self, _byte_count: None):
            right(self, *arguments)

    return patch.object(JournalReader, "_cut", cut)


def _change_without_a_record() -> AbstractContextManager[object]:
    """Let a change of the rate be made that nothing is written down of but the spec."""
    right = changes.to_record

    def to_record(change: Change, sequence: int, time_s: float) -> Record:
        record = right(change, sequence, time_s)
        if not isinstance(change, SpecChange):
            return record
        rates_set = [False] * len(change.rates_set)
        return replace(record, facts={**record.facts, "rates_set": rates_set})

    return patch.object(durability, "to_record", to_record)


def _count_an_epoch_twice() -> AbstractContextManager[object]:
    """Advance the schedule once more when the end of an epoch is replayed."""
    right = changes.replay

    def replay(session: Session, record: Record) -> float:
        time_s = right(session, record)
        if record.kind is RecordKind.EPOCH and session._schedule:
            session._schedule.advance()
        return time_s

    return patch.object(recovery, "replay", replay)


def _end_another_epoch() -> AbstractContextManager[object]:
    """Take the repeat of an epoch's end for the end of the next one."""
    right = Session.end_epoch

    def end_epoch(self: Session, epoch: int) -> None:
        self._epoch_steps += epoch == self.epochs
        right(self, max(epoch, self.epochs + 1))

    return patch.object(Session, "end_epoch", end_epoch)


def _forget_epochs_on_disk() -> AbstractContextManager[object]:
    """Leave the number of the epochs out of snapshots."""
    right = Session.capture

    def capture(self: Session, **arguments: bool) -> SessionState:
        return replace(right(self, **arguments), epochs=0)

    return patch.object(Session, "capture", capture)


def _save_while_it_steps() -> AbstractContextManager[object]:
    """Write a state without a copy of it, and let the session go on meanwhile."""
    right = Session.capture
    return patch.object(Session, "capture", lambda self, **_arguments: right(self, copy=False))


def _save_no_momenta() -> AbstractContextManager[object]:
    """Leave what the optimizer keeps out of checkpoints."""

    def without(state: SessionState, about: Mapping[str, Json]) -> Snapshot:
        return to_snapshot(replace(state, optimizer_state={}), about)

    return patch.object(checkpoints, "to_snapshot", without)


def _restore_with_first_rates() -> AbstractContextManager[object]:
    """Have a session that is restored begin with the rates of its spec."""
    right = Session.restored.__func__  # type: ignore[attr-defined] # A class method has it.

    def restored(
        cls: type[Session], state: SessionState, device: Device, limits: Limits
    ) -> Session:
        session: Session = right(cls, state, device, limits)
        for group, own in zip(session._optimizer.param_groups, state.spec.groups, strict=True):
            group["lr"] = own.hyperparameters["lr"]
        return session

    return patch.object(Session, "restored", classmethod(restored))


def _lose_more_than_agreed() -> AbstractContextManager[object]:
    """Go on stepping, however late a snapshot is."""

    async def admit(_self: Archive) -> None:
        """Wait for nothing."""

    return patch.object(Archive, "admit", admit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """A bug to plant."""

    plant: Callable[[], AbstractContextManager[object]]
    promises: Sequence[Promise] = tuple(Promise)
    """Which promises it breaks."""


PLANTED: Mapping[str, Bug] = {
    "forget the digest": Bug(plant=_forget_the_digest),
    "do not keep the digest": Bug(plant=_do_not_keep_the_digest),
    "apply a repeat": Bug(plant=_apply_a_repeat),
    "forget who waits": Bug(plant=_forget_who_waits),
    "drop what timed out": Bug(plant=_drop_what_timed_out),
    "add in another order": Bug(plant=_add_in_another_order),
    "apply what is not finite": Bug(plant=_apply_what_is_not_finite),
    "share a seat": Bug(plant=_share_a_seat),
    "make a session for each request": Bug(plant=_make_a_session_for_each_request),
    "keep the memory": Bug(plant=_keep_the_memory),
    "skip the fsync": Bug(plant=_skip_the_fsync, promises=_POWER),
    "acknowledge before the write": Bug(plant=_acknowledge_before_the_write, promises=_RECORDS),
    "acknowledge before the sync": Bug(plant=_acknowledge_before_the_sync, promises=_POWER),
    "leave names unsynced": Bug(plant=_leave_names_unsynced, promises=_POWER),
    "prune too early": Bug(plant=_prune_too_early, promises=_RECORDS),
    "forget digests on disk": Bug(plant=_forget_digests_on_disk, promises=_RECORDS),
    "forget momenta on disk": Bug(plant=_forget_momenta_on_disk, promises=_DISK),
    "replay less": Bug(plant=_replay_less, promises=_RECORDS),
    "leave half a record": Bug(plant=_leave_half_a_record, promises=_RECORDS),
    "change without a record": Bug(plant=_change_without_a_record, promises=_RECORDS),
    "count an epoch twice": Bug(plant=_count_an_epoch_twice, promises=_RECORDS),
    "end another epoch": Bug(plant=_end_another_epoch, promises=_OPERATED),
    "forget epochs on disk": Bug(plant=_forget_epochs_on_disk, promises=_OPERATED),
    "save while it steps": Bug(plant=_save_while_it_steps, promises=_OPERATED),
    "save no momenta": Bug(plant=_save_no_momenta, promises=_OPERATED),
    "restore with first rates": Bug(plant=_restore_with_first_rates, promises=_OPERATED),
    "lose more than agreed": Bug(plant=_lose_more_than_agreed, promises=[Promise.SNAPSHOT]),
}
"""By what they do wrong."""
