"""One session's directory: its head, its snapshots and its journal."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace

from optserve_server.core import failpoints
from optserve_server.core.storage import (
    DamagedError,
    Json,
    Loaded,
    Origin,
    Record,
    SkippedSnapshot,
    Snapshot,
)
from optserve_server.storage.commits import Commits
from optserve_server.storage.disk import Disk, remove_tree, translated
from optserve_server.storage.journal import Journal
from optserve_server.storage.places import (
    HEAD,
    UNFINISHED,
    Owner,
    save_directory,
    segments_in,
    session_directory,
    snapshot_name,
    snapshots_in,
    tree_bytes,
    write_head,
)
from optserve_server.storage.snapshot import read_snapshot, write_snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the stores of one data directory have in common."""

    disk: Disk
    origin: Origin
    commits: Commits
    segment_bytes_max: int


class LocalSessionStore:
    """See SessionStore."""

    def __init__(self, owner: Owner, surroundings: Surroundings, *, sequence: int | None) -> None:
        """Serve the session of ``owner``.

        Args:
            owner: What the catalogue says of it.
            surroundings: What it shares with others.
            sequence: Number of its one snapshot, if it was just created. None: load() it.
        """
        self.session_id = owner.session_id
        self._owner = owner
        self._directory = session_directory(owner.session_id)
        self._disk = surroundings.disk
        self._origin = surroundings.origin
        self._journal = Journal(
            surroundings.disk,
            self._directory,
            owner.session_id,
            origin=surroundings.origin,
            commits=surroundings.commits,
            segment_bytes_max=surroundings.segment_bytes_max,
            sequence=sequence or 0,
        )
        self._snapshots: list[int] = [] if sequence is None else [sequence]
        self._saving = threading.Lock()  # One snapshot, and one head, is written at a time.
        self._closed = False

    @property
    def sequence(self) -> int:
        """See SessionStore."""
        return self._journal.sequence

    @property
    def snapshot_sequence(self) -> int:
        """See SessionStore."""
        return self._snapshots[-1]

    @property
    def durable_sequence(self) -> int:
        """See SessionStore."""
        return self._journal.durable

    @property
    def journal_bytes(self) -> int:
        """See SessionStore."""
        return self._journal.byte_count

    @property
    def kept_bytes(self) -> int:
        """See SessionStore."""
        with translated(self._directory):
            found = self._disk.entries(self._directory)
            kept = [f"{self._directory}/{each.name}" for each in found if each.is_directory]
            heads = [each.byte_count or 0 for each in found if each.name == HEAD]
            return sum(heads) + sum(tree_bytes(self._disk, path) for path in kept)

    def append(self, record: Record) -> int:
        """See SessionStore."""
        return self._journal.append(record)

    def commit(self) -> Future[None]:
        """See SessionStore."""
        return self._journal.commit()

    def save_snapshot(self, snapshot: Snapshot) -> None:
        """See SessionStore."""
        with self._saving:
            if snapshot.sequence == self._snapshots[-1]:
                return
            assert snapshot.sequence > self._snapshots[-1], "snapshots are saved in their order"
            # First the journal: on stable storage no snapshot is ahead of it, so that the one
            # before, with the journal, always leads to this one.
            self._journal.seal()
            self._journal.commit().result()
            path = f"{self._directory}/{snapshot_name(snapshot.sequence)}"
            with translated(path):
                save_directory(
                    self._disk, path, lambda unfinished: self._write(unfinished, snapshot)
                )
            failpoints.reach("snapshot-renamed")
            self._snapshots.append(snapshot.sequence)
            self._journal.skip_to(snapshot.sequence)
            self._prune()

    def update_facts(self, facts: Mapping[str, Json]) -> None:
        """See SessionStore."""
        with self._saving:
            owner = replace(self._owner, facts=dict(facts))
            with translated(self._directory):
                write_head(self._disk, self._directory, owner)
                self._disk.sync_directory(self._directory)
            self._owner = owner

    def load(self) -> Loaded:
        """See SessionStore."""
        assert not self._snapshots, "a session is loaded once"
        with translated(self._directory):
            entries = self._disk.entries(self._directory)
            for entry in entries:
                if entry.name.endswith(UNFINISHED) and entry.is_directory:
                    remove_tree(self._disk, f"{self._directory}/{entry.name}")
            # What a killed process has renamed is relied on from now on, also by durable_steps.
            self._disk.sync_directory(self._directory)
        skipped: list[SkippedSnapshot] = []
        for sequence in snapshots_in(entries):
            try:
                snapshot = self._read(sequence)
            except DamagedError as damage:
                skipped.append(SkippedSnapshot(sequence=sequence, damage=damage))
                continue
            self._snapshots = [sequence]
            records, origins = self._journal.load(
                segments_in(self._directory, entries), after=sequence
            )
            return Loaded(snapshot=snapshot, records=records, origins=origins, skipped=skipped)
        if skipped:
            raise skipped[0].damage
        raise DamagedError(self._directory, 0, "there is no snapshot")

    def close(self) -> None:
        """See SessionStore."""
        if not self._closed:
            self._closed = True
            with self._saving:
                self._journal.close()

    def _write(self, path: str, snapshot: Snapshot) -> None:
        write_snapshot(self._disk, path, snapshot, self._origin, self._owner.encode())
        failpoints.reach("snapshot-written")

    def _read(self, sequence: int) -> Snapshot:
        path = f"{self._directory}/{snapshot_name(sequence)}"
        with translated(path):
            _, snapshot = read_snapshot(self._disk, path)
        if snapshot.sequence != sequence:
            raise DamagedError(path, 0, f"it is the snapshot after record {snapshot.sequence}")
        return snapshot

    def _prune(self) -> None:
        """Remove what is older than the previous snapshot, and what is damaged."""
        self._snapshots = self._snapshots[-2:]
        with translated(self._directory):
            for sequence in snapshots_in(self._disk.entries(self._directory)):
                if sequence not in self._snapshots:
                    remove_tree(self._disk, f"{self._directory}/{snapshot_name(sequence)}")
        self._journal.prune(after=self._snapshots[0])
