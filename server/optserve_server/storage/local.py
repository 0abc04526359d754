"""A data directory on a disk of this host: the default storage."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterator, Mapping, Sequence

from optserve_server.core.storage import (
    AlreadyStoredError,
    Checkpoint,
    CheckpointKey,
    DamagedError,
    Json,
    NotStoredError,
    Origin,
    Snapshot,
    StoredSession,
)
from optserve_server.storage.commits import Commits
from optserve_server.storage.disk import Disk, read_file, remove_tree, translated
from optserve_server.storage.document import decode_document
from optserve_server.storage.places import (
    CHECKPOINTS,
    DELETED,
    SESSIONS,
    UNFINISHED,
    VERSION,
    Owner,
    checkpoint_directory,
    identity,
    is_finished,
    read_head,
    save_directory,
    session_directory,
    snapshot_name,
    snapshots_in,
    tree_bytes,
    write_document,
    write_head,
)
from optserve_server.storage.snapshot import Manifest, read_manifest, read_snapshot, write_snapshot
from optserve_server.storage.store import LocalSessionStore, Surroundings

SEGMENT_BYTES_MAX = 64 << 20  # Small enough to ship and to read in one go; a record may be larger.

_SESSION_ID = re.compile(r"[0-9a-f]{1,64}")


class LocalStorage:
    """See Storage. The directories are the catalogue: there is nothing beside them to be wrong."""

    def __init__(
        self,
        disk: Disk,
        origin: Origin,
        *,
        segment_bytes_max: int = SEGMENT_BYTES_MAX,
        threaded: bool = True,
    ) -> None:
        """Take the data directory, and remove what a crash has left unfinished.

        Args:
            disk: The data directory, which close() lets go.
            origin: Who writes from now on.
            segment_bytes_max: When a journal goes on in another file.
            threaded: Whether commits of many sessions are gathered, in a thread. If not, each is
                made before commit() returns: for a simulation.

        Raises:
            StorageBusyError: Another process has it.
            StorageVersionError: A newer server wrote it.
            DamagedError: It is something else.
            StorageError: It cannot be read or written.
        """
        self._disk = disk
        with translated("data directory"):
            disk.lock()
            try:
                _prepare(disk)
                numbers = [owner.order for owner, *_ in self._session_owners() if owner]
                numbers += [owner.order for owner, *_ in self._checkpoint_owners()]
            except BaseException:
                disk.close()
                raise
        self._orders = itertools.count(max(numbers, default=0) + 1)
        self._naming = threading.Lock()  # Two checkpoints of one name are not saved at once.
        self._commits = Commits(disk, threaded=threaded)
        self._surroundings = Surroundings(
            disk=disk, origin=origin, commits=self._commits, segment_bytes_max=segment_bytes_max
        )

    @property
    def free_bytes(self) -> int:
        """See Storage."""
        with translated("data directory"):
            return self._disk.free_bytes

    def sessions(self) -> Sequence[StoredSession]:
        """See Storage."""
        found: list[tuple[int, StoredSession]] = []
        with translated(SESSIONS):
            for owner, session_id, damage in self._session_owners():
                directory = session_directory(session_id)
                session = StoredSession(
                    session_id=session_id,
                    facts=owner.facts if owner else {},
                    sequence=max(snapshots_in(self._disk.entries(directory)), default=0),
                    bytes_on_disk=tree_bytes(self._disk, directory),
                    damage=damage,
                )
                found.append((owner.order if owner else 0, session))
        return [session for _, session in sorted(found, key=lambda each: each[0])]

    def create(
        self, session_id: str, facts: Mapping[str, Json], snapshot: Snapshot
    ) -> LocalSessionStore:
        """See Storage."""
        assert _SESSION_ID.fullmatch(session_id), "ids are the server's own, and safe as names"
        owner = Owner(session_id=session_id, order=next(self._orders), facts=dict(facts))
        path = session_directory(session_id)
        disk = self._disk

        def write(unfinished: str) -> None:
            disk.make_directory(unfinished)
            inner = f"{unfinished}/{snapshot_name(snapshot.sequence)}"
            write_snapshot(disk, inner, snapshot, self._surroundings.origin, owner.encode())
            write_head(disk, unfinished, owner)
            disk.sync_directory(unfinished)

        with translated(path):
            if self._is_there(session_directory(session_id)):
                raise AlreadyStoredError(f"there is a session {session_id}")
            save_directory(disk, path, write)
        return LocalSessionStore(owner, self._surroundings, sequence=snapshot.sequence)

    def open(self, session_id: str) -> LocalSessionStore:
        """See Storage."""
        with translated(SESSIONS):
            if not self._is_there(session_directory(session_id)):
                raise NotStoredError(f"there is no session {session_id}")
            owner, damage = self._session_owner(session_id)
        if owner is None:
            assert damage is not None
            raise damage
        return LocalSessionStore(owner, self._surroundings, sequence=None)

    def delete(self, session_id: str) -> None:
        """See Storage."""
        with translated(SESSIONS):
            missing = NotStoredError(f"there is no session {session_id}")
            self._delete(session_directory(session_id), missing)

    def checkpoints(
        self, tenant: str | None = None, session_id: str | None = None
    ) -> Sequence[Checkpoint]:
        """See Storage."""
        with translated(CHECKPOINTS):
            found = [
                (owner.order, self._found(owner, manifest, path))
                for owner, manifest, path in self._checkpoint_owners()
                if tenant in (None, owner.tenant) and session_id in (None, owner.session_id)
            ]
        return [checkpoint for _, checkpoint in sorted(found, key=lambda each: each[0])]

    def save_checkpoint(
        self, key: CheckpointKey, facts: Mapping[str, Json], snapshot: Snapshot
    ) -> Checkpoint:
        """See Storage."""
        assert _SESSION_ID.fullmatch(key.session_id), "ids are the server's own, and safe as names"
        path = checkpoint_directory(key)
        owner = Owner(
            session_id=key.session_id,
            order=next(self._orders),
            facts=dict(facts),
            tenant=key.tenant,
            name=key.name,
        )
        origin = self._surroundings.origin
        with self._naming, translated(path):
            if self._is_there(path):
                raise AlreadyStoredError(f"session {key.session_id} has a checkpoint {key.name!r}")
            byte_count = save_directory(
                self._disk,
                path,
                lambda other: write_snapshot(self._disk, other, snapshot, origin, owner.encode()),
            )
        return _checkpoint(owner, snapshot.sequence, origin, byte_count)

    def load_checkpoint(self, key: CheckpointKey) -> tuple[Checkpoint, Snapshot]:
        """See Storage."""
        path = _checkpoint_path(key)
        with translated(path):
            if not self._is_there(path):
                raise _no_checkpoint(key)
            manifest, snapshot = read_snapshot(self._disk, path)
            owner = Owner.decode(path, manifest.owner)
            checkpoint = self._found(owner, manifest, path)
        if checkpoint.key != key:
            raise DamagedError(path, 0, "it is another checkpoint")
        return checkpoint, snapshot

    def delete_checkpoint(self, key: CheckpointKey) -> None:
        """See Storage."""
        path = _checkpoint_path(key)
        with translated(path):
            self._delete(path, _no_checkpoint(key))

    def close(self) -> None:
        """See Storage."""
        self._commits.close()
        self._disk.close()

    def _is_there(self, path: str) -> bool:
        parent, _, name = path.rpartition("/")
        return any(entry.name == name for entry in self._disk.entries(parent))

    def _delete(self, path: str, missing: NotStoredError) -> None:
        """Delete a directory: at once under its name, then what was in it.

        What the disk has failed in before is gone on with.

        Raises:
            NotStoredError: ``missing``: there is none, and nothing left of one.
        """
        parent, _, name = path.rpartition("/")
        names = {entry.name for entry in self._disk.entries(parent)}
        if name in names:
            if name + DELETED in names:  # Left of another one of this name.
                remove_tree(self._disk, path + DELETED)
            self._disk.rename(path, path + DELETED)
        elif name + DELETED not in names:
            raise missing
        self._disk.sync_directory(parent)
        remove_tree(self._disk, path + DELETED)

    def _session_owners(self) -> Iterator[tuple[Owner | None, str, DamagedError | None]]:
        for entry in self._disk.entries(SESSIONS):
            if _SESSION_ID.fullmatch(entry.name):
                owner, damage = self._session_owner(entry.name)
                yield owner, entry.name, damage

    def _session_owner(self, session_id: str) -> tuple[Owner | None, DamagedError | None]:
        """Return what a session's head says; if that is damaged, what a snapshot of it says."""
        directory = session_directory(session_id)
        try:
            return read_head(self._disk, directory), None
        except DamagedError as error:
            damage = error
        for sequence in snapshots_in(self._disk.entries(directory)):
            path = f"{directory}/{snapshot_name(sequence)}"
            try:
                return Owner.decode(path, read_manifest(self._disk, path).owner), None
            except DamagedError:
                continue
        return None, damage

    def _found(self, owner: Owner, manifest: Manifest, path: str) -> Checkpoint:
        """Return the checkpoint in a directory."""
        byte_count = tree_bytes(self._disk, path)
        return _checkpoint(owner, manifest.sequence, manifest.origin, byte_count)

    def _checkpoint_owners(self) -> Iterator[tuple[Owner, Manifest, str]]:
        """Yield the checkpoints whose manifests can be read."""
        for entry in self._disk.entries(CHECKPOINTS):
            path = f"{CHECKPOINTS}/{entry.name}"
            try:
                manifest = read_manifest(self._disk, path)
                yield Owner.decode(path, manifest.owner), manifest, path
            except DamagedError:
                continue  # Whose it is stands in what is damaged.


def _prepare(disk: Disk) -> None:
    """Make a data directory of an empty one, and remove what a crash has left in it.

    Raises:
        StorageVersionError: A newer server wrote it.
        DamagedError: It is something else.
    """
    names = {entry.name for entry in disk.entries("")}
    if VERSION in names:
        decode_document(VERSION, read_file(disk, VERSION))
    elif {SESSIONS, CHECKPOINTS} & names:
        raise DamagedError(VERSION, 0, "it is missing, beside sessions")
    else:
        write_document(disk, VERSION + UNFINISHED, identity())
        disk.rename(VERSION + UNFINISHED, VERSION)
        disk.sync_directory("")
    for parent in (SESSIONS, CHECKPOINTS):
        if parent not in names:
            disk.make_directory(parent)
            disk.sync_directory("")
        for entry in disk.entries(parent):
            if not is_finished(entry.name):
                remove_tree(disk, f"{parent}/{entry.name}")
    # A process that was killed may have left names that only the system knows. Whoever finds them
    # relies on them, and so they must survive a loss of power from now on.
    for directory in ("", SESSIONS, CHECKPOINTS):
        disk.sync_directory(directory)


def _no_checkpoint(key: CheckpointKey) -> NotStoredError:
    return NotStoredError(f"session {key.session_id!r} has no checkpoint {key.name!r}")


def _checkpoint_path(key: CheckpointKey) -> str:
    """Return where a checkpoint lies, if it does.

    Raises:
        NotStoredError: It cannot, whatever is on disk. Callers ask for what they like.
    """
    if not _SESSION_ID.fullmatch(key.session_id):
        raise _no_checkpoint(key)
    return checkpoint_directory(key)


def _checkpoint(owner: Owner, sequence: int, origin: Origin, byte_count: int) -> Checkpoint:
    key = CheckpointKey(tenant=owner.tenant, session_id=owner.session_id, name=owner.name)
    return Checkpoint(
        key=key,
        facts=owner.facts,
        sequence=sequence,
        bytes_on_disk=byte_count,
        origin=origin,
    )
