"""A copy of a data directory in another place, of all that does not change any more.

Snapshots, checkpoints and sealed segments of journals have names that are never used again, and are
whole and unchanging once they have them. So a copy needs no protocol: what is missing there is
sent, what is not here any more is removed, and a pass that was interrupted is made up for by the
next one. A snapshot's manifest goes last: without one it is not there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from xxhash import xxh3_128_digest

from optserve_server.core.storage import StorageError
from optserve_server.storage.disk import Disk, File, read_file, remove_tree, translated
from optserve_server.storage.document import decode_document
from optserve_server.storage.places import (
    CHECKPOINTS,
    HEAD,
    LOCK,
    SESSIONS,
    UNFINISHED,
    VERSION,
    identity,
    is_finished,
    segments_in,
    snapshot_name,
    snapshots_in,
    write_document,
)
from optserve_server.storage.snapshot import MANIFEST, TENSORS, decode_manifest

_logger = logging.getLogger(__name__)

_OURS = (VERSION, SESSIONS, CHECKPOINTS)
_RESTORING = VERSION + UNFINISHED

PIECE_BYTES = 8 << 20  # What object stores like to get at once.


class ObjectStore(Protocol):
    """Names with bytes behind them, each written whole. Errors are ArchiveErrors."""

    def sizes(self) -> Mapping[str, int]:
        """Return all names that are there, with the number of bytes behind each."""

    def read(self, name: str) -> Iterator[bytes]:
        """Yield the bytes behind a name, piece by piece."""

    def write(self, name: str, pieces: Iterator[bytes]) -> None:
        """Put bytes behind a name, in the place of what is there.

        StorageErrors of the pieces are raised as they are.
        """

    def remove(self, name: str) -> None:
        """Remove a name."""


class ArchiveError(StorageError):
    """The archive does not answer, or not as it should."""


class ForeignArchiveError(StorageError):
    """What is in the place of the archive is none of this data directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What one look at everything has come to."""

    sent_bytes: int
    removed: int
    """Names that were removed."""
    is_complete: bool
    """Whether nothing was pruned or deleted under it. If not, the next pass goes on."""


class Mirror:
    """Keeps an archive like a data directory, one pass at a time."""

    def __init__(self, disk: Disk, archive: ObjectStore) -> None:
        """Send from ``disk``, which a server may be using, to ``archive``."""
        self._disk = disk
        self._archive = archive
        # Of small files, as they are in the archive. A long history makes megabytes of a manifest.
        self._known: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._sent_bytes = 0

    def ship(self) -> Pass:
        """Send what the archive has not, and remove from it what is not here any more.

        Raises:
            ForeignArchiveError: It is of another data directory; it would be emptied.
            ArchiveError: It does not answer.
            OSError: The data directory cannot be read.
        """
        self._sizes = dict(self._archive.sizes())
        self._sent_bytes = 0
        self._check_identity()
        is_complete = True
        kept = {VERSION}
        for owner in self._owners():
            try:
                kept.update(self._ship_owner(owner))
                continue
            except FileNotFoundError:  # It was pruned or deleted meanwhile.
                is_complete = False
            except ArchiveError:
                raise
            except (OSError, StorageError) as trouble:  # What the archive has of it may be whole.
                _logger.warning("not archived: %s", trouble)
            kept.update(name for name in self._sizes if name.startswith(f"{owner}/"))
        gone = sorted(self._sizes.keys() - kept, key=_manifests_first)
        for name in gone:
            self._archive.remove(name)
            self._known.pop(name, None)
        return Pass(sent_bytes=self._sent_bytes, removed=len(gone), is_complete=is_complete)

    def _check_identity(self) -> None:
        _check_place(self._sizes)
        self._known.pop(VERSION, None)  # Another data directory may have been made of it by now.
        version = read_file(self._disk, VERSION)
        if VERSION not in self._sizes and not self._sizes:
            self._send_small(VERSION, version)
        elif VERSION not in self._sizes or not self._has_small(VERSION, version):
            raise ForeignArchiveError(
                "the archive is of another data directory, which may have been restored from it,"
                " and would be emptied; restore that one, or choose another place"
            )

    def _owners(self) -> list[str]:
        return [
            f"{parent}/{entry.name}"
            for parent in (SESSIONS, CHECKPOINTS)
            for entry in self._disk.entries(parent)
            if entry.is_directory and is_finished(entry.name)
        ]

    def _ship_owner(self, owner: str) -> set[str]:
        """Send a session or a checkpoint; return the names of all that there shall be of it.

        In order: the archive never has a record or a snapshot without what leads there.
        """
        parent = owner.rpartition("/")[0]
        if parent == CHECKPOINTS:
            return self._ship_snapshot(parent, owner)
        entries = self._disk.entries(owner)
        names: set[str] = set()
        for sequence in reversed(snapshots_in(entries)):
            names |= self._ship_snapshot(owner, f"{owner}/{snapshot_name(sequence)}")
        for segment in segments_in(owner, entries)[:-1]:  # The last one may still grow.
            names.add(segment.path)
            if self._sizes.get(segment.path) != segment.byte_count:
                self._send(owner, segment.path)
        head = f"{owner}/{HEAD}"
        content = read_file(self._disk, head)
        if not self._has_small(head, content):
            decode_document(head, content)
            self._send_small(head, content)
        return {*names, head}

    def _ship_snapshot(self, parent: str, directory: str) -> set[str]:
        manifest, tensors = f"{directory}/{MANIFEST}", f"{directory}/{TENSORS}"
        content = read_file(self._disk, manifest)
        has_tensors = any(entry.name == TENSORS for entry in self._disk.entries(directory))
        # A checkpoint may have been deleted, and saved again under its name: its manifest tells.
        if not self._has_small(manifest, content):
            decode_manifest(manifest, content)
            if has_tensors:
                self._send(parent, tensors)
            self._send_small(manifest, content)
        return {manifest, tensors} if has_tensors else {manifest}

    def _send(self, directory: str, path: str) -> None:
        """Send a file, once it and its name are on stable storage.

        What a loss of power takes away here may come again with other content and of the same size.
        """
        file = self._disk.open(path)
        try:
            file.sync()
            self._disk.sync_directory(directory)
            self._archive.write(path, _pieces(file))
            self._sent_bytes += file.size()
        finally:
            file.close()

    def _has_small(self, name: str, content: bytes) -> bool:
        if name not in self._known and self._sizes.get(name) == len(content):
            self._known[name] = xxh3_128_digest(b"".join(self._archive.read(name)))
        return self._known.get(name) == xxh3_128_digest(content)

    def _send_small(self, name: str, content: bytes) -> None:
        self._archive.write(name, iter([content]))
        self._known[name] = xxh3_128_digest(content)
        self._sent_bytes += len(content)


def restore_if_empty(archive: ObjectStore, disk: Disk) -> int:
    """Make a data directory of what an archive holds, unless there is something already.

    A session comes back as it was when its last sealed segment, or its last snapshot, was sent.
    The archive is the new directory's from then on: the one that it is from, if it is still there,
    has other sessions by now, and two that are kept alike with one archive would empty each other.

    Args:
        archive: From Mirror; an empty one has nothing to restore.
        disk: The directory; closed afterwards.

    Returns:
        How many bytes were read.

    Raises:
        ForeignArchiveError: The archive is none.
        StorageVersionError: A newer server wrote it.
        StorageBusyError: Another server uses the directory.
        ArchiveError: It does not answer. To try again begins anew.
        OSError: The directory cannot be written to. As above.
    """
    disk.lock()
    try:
        # Ours alone: a file system of its own begins with others, such as lost+found.
        names = {entry.name for entry in disk.entries("")} & {*_OURS, _RESTORING}
        if names and _RESTORING not in names:
            return 0
        for name in names:  # Of a restore that was interrupted.
            disk.remove(name) if name == _RESTORING else remove_tree(disk, name)
        return _restore(archive, disk)
    finally:
        disk.close()


class Watcher(Protocol):
    """Is told of passes, in the thread that makes them."""

    def archive_shipped(self) -> None:
        """Hear that the archive has everything that was finished when the pass began."""

    def archive_failed(self) -> None:
        """Hear that it has not: it is behind, and the next pass tries again."""


class Shipping:
    """Makes a pass again and again, in a thread of its own."""

    def __init__(self, mirror: Mirror, watcher: Watcher, *, interval_s: float) -> None:
        """Begin to make passes, ``interval_s`` apart; sooner after an incomplete one."""
        self._mirror = mirror
        self._watcher = watcher
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shipping", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Make a last pass, and end."""
        self._stop.set()
        self._thread.join()
        self._pass()

    def _run(self) -> None:
        delay_s = 0.0
        while not self._stop.wait(delay_s):
            delay_s = self._interval_s if self._pass() else min(1.0, self._interval_s)

    def _pass(self) -> bool:
        """Make a pass; return whether the next one may wait."""
        try:
            is_complete = self._mirror.ship().is_complete
        except ForeignArchiveError as error:
            _logger.error("nothing is archived: %s", error)  # noqa: TRY400 It is no surprise.
        except (OSError, StorageError) as error:
            # The next one makes up for it: meanwhile the archive is behind, and the log says so.
            _logger.warning("the archive is behind: %s", error)
        except Exception:  # Whatever it was, it is no reason to archive nothing any more.
            _logger.exception("the archive is behind")
        else:
            if is_complete:
                self._watcher.archive_shipped()
            return is_complete
        self._watcher.archive_failed()
        return True


def _restore(archive: ObjectStore, disk: Disk) -> int:
    sizes = archive.sizes()
    _check_place(sizes)
    if not sizes:
        return 0
    if VERSION not in sizes:
        raise ForeignArchiveError("there is no archive of a data directory")
    version = b"".join(archive.read(VERSION))
    decode_document(VERSION, version)
    # It gets its name at the end: without it, this is no data directory.
    write_document(disk, _RESTORING, identity())
    disk.sync_directory("")
    received = len(version)
    made = {""}
    for name in sorted(sizes.keys() - {VERSION}):
        parent, _, last = name.rpartition("/")
        if last in (MANIFEST, TENSORS) and f"{parent}/{MANIFEST}" not in sizes:
            continue  # A snapshot that had not come whole.
        _make(disk, parent, made)
        received += _receive(archive, disk, name)
    for parent in sorted(made, reverse=True):
        disk.sync_directory(parent)
    archive.write(VERSION, iter([read_file(disk, _RESTORING)]))
    disk.rename(_RESTORING, VERSION)
    disk.sync_directory("")
    return received


def _check_place(names: Iterable[str]) -> None:
    """Make sure that no data directory is where the archive shall be.

    Raises:
        ForeignArchiveError: One is. It would be emptied of what no archive has.
    """
    for name in names:
        if name.rpartition("/")[2] == LOCK:
            raise ForeignArchiveError(
                f"{name}: a data directory is in the place of the archive; choose another place"
            )


def _manifests_first(name: str) -> bool:
    """Sort for removal: what has lost its manifest is not there any more."""
    return not name.endswith(MANIFEST)


def _pieces(file: File) -> Iterator[bytes]:
    size = file.size()
    for offset in range(0, size, PIECE_BYTES):
        piece = bytearray(min(PIECE_BYTES, size - offset))
        with translated(file.path):
            file.read_at(offset, memoryview(piece))
        yield bytes(piece)


def _receive(archive: ObjectStore, disk: Disk, name: str) -> int:
    file = disk.create(name)
    try:
        offset = 0
        for piece in archive.read(name):
            file.write_at(offset, [piece])
            offset += len(piece)
        file.sync()
        return offset
    finally:
        file.close()


def _make(disk: Disk, directory: str, made: set[str]) -> None:
    if directory not in made:
        _make(disk, directory.rpartition("/")[0], made)
        disk.make_directory(directory)
        made.add(directory)
