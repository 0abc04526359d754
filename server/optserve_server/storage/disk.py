"""The disk, as storage sees it: files, directories, and what survives a power loss.

What POSIX promises, and nothing more, is what callers may rely on: written bytes survive the
process; they survive a power loss once their file was synced; a file's name does once its directory
was synced, too; a rename is atomic. Tests put a disk in the place of this one that keeps to the
letter of it.

Paths are relative to the data directory, with ``/`` between names; ``""`` is the directory itself.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from optserve_server.core.storage import (
    StorageBusyError,
    StorageFailedError,
    StorageFullError,
    UnreadableError,
)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What stands in a directory."""

    name: str
    byte_count: int | None
    """Size of a file. None: a directory."""

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.byte_count is None


class File(Protocol):
    """An open file. Errors are OSErrors: the callers know what they mean."""

    @property
    def path(self) -> str:
        """Where it was opened."""

    def size(self) -> int:
        """Return how many bytes it has."""

    def read_at(self, offset: int, target: memoryview) -> int:
        """Fill ``target`` from ``offset`` on; return how many bytes there were."""

    def write_at(self, offset: int, pieces: Sequence[memoryview | bytes]) -> None:
        """Write all pieces, one behind the other. On an error, some of it may be written."""

    def truncate(self, byte_count: int) -> None:
        """Cut it off behind ``byte_count`` bytes."""

    def sync(self) -> None:
        """Put its bytes onto stable storage."""

    def close(self) -> None:
        """Let it go; again: no effect."""


class Disk(Protocol):
    """A data directory. Errors are OSErrors: the callers know what they mean."""

    @property
    def boot(self) -> str:
        """Differs whenever power may have been lost meanwhile, and unsynced bytes with it."""

    @property
    def free_bytes(self) -> int:
        """How much room there is."""

    def lock(self) -> None:
        """Make sure that no other process uses the directory, as long as this one lives.

        Raises:
            StorageBusyError: One does.
        """

    def close(self) -> None:
        """Let go of the lock."""

    def create(self, path: str) -> File:
        """Create a file, which must not be there."""

    def open(self, path: str) -> File:
        """Open a file that is there."""

    def make_directory(self, path: str) -> None:
        """Create a directory, whose parent must be there."""

    def entries(self, path: str) -> Sequence[Entry]:
        """Return what stands in a directory, in any order."""

    def rename(self, source: str, target: str) -> None:
        """Give a file or a directory another name, in the place of what has it."""

    def remove(self, path: str) -> None:
        """Remove a file."""

    def remove_directory(self, path: str) -> None:
        """Remove an empty directory."""

    def sync_directory(self, path: str) -> None:
        """Put the names in a directory onto stable storage."""

    def sync_files(self, files: Sequence[File]) -> Mapping[File, OSError]:
        """Put the bytes of many files onto stable storage at once; return which ones failed.

        To ask again helps nothing: the system tells once that it has lost a write.
        """


@contextmanager
def translated(path: str) -> Iterator[None]:
    """Say what an error of the disk means for a store.

    Raises:
        StorageFullError: It has no room.
        StorageFailedError: Anything else.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        what = f"{path}: {reason}" + (f" ({error.filename})" if error.filename else "")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(what) from error
        raise StorageFailedError(what) from error


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Take what the disk cannot read for damage of that file, and of no other.

    Raises:
        UnreadableError: It cannot read ``path``.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise UnreadableError(path) from error


def read_file(disk: Disk, path: str) -> bytes:
    """Return what is in a small file.

    Raises:
        UnreadableError: The disk cannot read it.
    """
    with readable(path):
        file = disk.open(path)
        try:
            data = bytearray(file.size())
            return bytes(data[: file.read_at(0, memoryview(data))])
        finally:
            file.close()


def remove_tree(disk: Disk, path: str) -> None:
    """Remove a directory with all that is in it."""
    for entry in disk.entries(path):
        inner = f"{path}/{entry.name}"
        remove_tree(disk, inner) if entry.is_directory else disk.remove(inner)
    disk.remove_directory(path)


_PIECES_MAX = 1024  # IOV_MAX of Linux.
_WRITE_BYTES_MAX = 1 << 30  # A write ends at 2 GiB less a page, whatever was asked for.
_APART_MAX = 3  # From here on one sync of the file system is faster: see docs/decisions/0011.
_SYNC_THREADS = 8
_SYNCFS_REPORTS = (5, 8)  # Linux: before, syncfs() did not tell when a write had failed.
_sync = getattr(os, "fdatasync", os.fsync)  # Not everywhere; then all of it, times included.


class LocalFile:
    """A file of a LocalDisk."""

    def __init__(self, path: str, descriptor: int) -> None:
        """Take over an open descriptor."""
        self.path = path
        self._descriptor = descriptor

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def size(self) -> int:
        """See File."""
        return os.fstat(self._descriptor).st_size

    def read_at(self, offset: int, target: memoryview) -> int:
        """See File."""
        done = 0
        while done < len(target):
            count = os.preadv(self._descriptor, [target[done:]], offset + done)
            if not count:
                break
            done += count
        return done

    def write_at(self, offset: int, pieces: Sequence[memoryview | bytes]) -> None:
        """See File."""
        if len(pieces) == 1 and os.pwrite(self._descriptor, pieces[0], offset) == len(pieces[0]):
            return  # A small record; otherwise it is begun again, and writes the same.
        waiting = [memoryview(piece) for piece in pieces if len(piece)]
        waiting.reverse()  # The next one is the last: taking it away costs nothing.
        while waiting:
            batch: list[memoryview] = []
            room = _WRITE_BYTES_MAX
            while waiting and room and len(batch) < _PIECES_MAX:
                piece = waiting.pop()
                if len(piece) > room:
                    waiting.append(piece[room:])
                    piece = piece[:room]
                batch.append(piece)
                room -= len(piece)
            count = os.pwritev(self._descriptor, batch, offset)
            offset += count
            while batch and count >= len(batch[0]):
                count -= len(batch.pop(0))
            waiting.extend(reversed(batch))
            if count:
                waiting[-1] = waiting[-1][count:]

    def truncate(self, byte_count: int) -> None:
        """See File."""
        os.ftruncate(self._descriptor, byte_count)

    def sync(self) -> None:
        """See File."""
        _sync(self._descriptor)

    def close(self) -> None:
        """See File."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class LocalDisk:
    """A directory of this host's file system."""

    def __init__(self, root: Path) -> None:
        """Use ``root``; it is created if it is not there.

        Raises:
            StorageError: It is no directory, or cannot be created.
        """
        self.root = root
        with translated(str(root)):
            _make_directories(root)
            self._directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        self._lock: int | None = None
        self._syncfs = _find_syncfs()

    @cached_property
    def boot(self) -> str:
        """See Disk."""
        boot_id = Path("/proc/sys/kernel/random/boot_id")
        # Without one, a reboot cannot be told from a restart, and is assumed: see Segment.boot.
        return boot_id.read_text().strip() if boot_id.exists() else os.urandom(16).hex()

    @property
    def free_bytes(self) -> int:
        """See Disk."""
        found = os.statvfs(self._directory)
        return found.f_bavail * found.f_frsize

    def lock(self) -> None:
        """See Disk."""
        descriptor = os.open(self._path("lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno != errno.EWOULDBLOCK:
                raise
            raise StorageBusyError(
                f"another server uses the data directory {self.root}; give each its own"
            ) from None
        self._lock = descriptor

    def close(self) -> None:
        """See Disk."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)
        directory, self._directory = self._directory, -1
        if directory >= 0:
            os.close(directory)

    def create(self, path: str) -> LocalFile:
        """See Disk."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return LocalFile(path, os.open(self._path(path), flags, 0o600))

    def open(self, path: str) -> LocalFile:
        """See Disk."""
        return LocalFile(path, os.open(self._path(path), os.O_RDWR | os.O_CLOEXEC))

    def make_directory(self, path: str) -> None:
        """See Disk."""
        self._path(path).mkdir(mode=0o700)

    def entries(self, path: str) -> Sequence[Entry]:
        """See Disk."""
        with os.scandir(self._path(path)) as found:
            return [
                Entry(name=each.name, byte_count=None if each.is_dir() else each.stat().st_size)
                for each in found
            ]

    def rename(self, source: str, target: str) -> None:
        """See Disk."""
        self._path(source).rename(self._path(target))

    def remove(self, path: str) -> None:
        """See Disk."""
        self._path(path).unlink()

    def remove_directory(self, path: str) -> None:
        """See Disk."""
        self._path(path).rmdir()

    def sync_directory(self, path: str) -> None:
        """See Disk."""
        descriptor = os.open(self._path(path), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync_files(self, files: Sequence[File]) -> Mapping[File, OSError]:
        """See Disk."""
        together = len(files) > _APART_MAX
        if together and self._syncfs is not None:
            if self._syncfs(self._directory) == 0:
                return {}
            # It may have been anybody's write. That is told once, to us, and never to the group
            # that file is in: from now on each file is asked, for each knows of its own.
            _logger.error("the file system cannot write; files are synced one by one from now on")
            self._syncfs = None
        if not together:
            errors = [_sync_error(file) for file in files]
        else:
            with ThreadPoolExecutor(_SYNC_THREADS) as pool:
                errors = list(pool.map(_sync_error, files))
        return {file: error for file, error in zip(files, errors, strict=True) if error}

    def _path(self, path: str) -> Path:
        return self.root / path


def _make_directories(path: Path) -> None:
    """Make a directory, for us alone, and those that it is in; their names are synced."""
    if not path.exists():
        _make_directories(path.parent)
        path.mkdir(mode=0o700)
        parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def _sync_error(file: File) -> OSError | None:
    try:
        file.sync()
    except OSError as error:
        return error
    return None


def _find_syncfs() -> ctypes._NamedFuncPointer | None:
    """Return the C library's syncfs(), which Python does not offer, where it is to be trusted."""
    if platform.system() != "Linux":
        return None
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    if release is None or (int(release[1]), int(release[2])) < _SYNCFS_REPORTS:
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
