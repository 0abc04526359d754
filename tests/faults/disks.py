"""A disk in memory that keeps what POSIX promises, and not a byte more.

Written bytes survive the process. A power loss leaves what was synced, and of the rest any part:
some writes and not others, half of one, a file longer than what is in it, names without files and
files without names. A failed sync is told once, and what it was about is lost.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random

from optserve_server.core.storage import StorageBusyError
from optserve_server.storage.disk import Entry, File

SECTOR_BYTES = 512  # What a disk writes whole or not at all.


class CrashError(BaseException):
    """The machine, or the process, has stopped here. No code of ours catches it."""


class Node:
    """A file's contents: as the system sees it, and as it is on stable storage."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.stable = b""
        self.changes: list[tuple[int, bytes | None]] = []
        """Since the last sync: bytes written at an offset; None: cut off there."""

    def write(self, offset: int, piece: bytes) -> None:
        """Write as the system does."""
        _put(self.data, offset, piece)
        self.changes.append((offset, piece))

    def truncate(self, byte_count: int) -> None:
        """Cut off."""
        del self.data[byte_count:]
        self.changes.append((byte_count, None))

    def sync(self) -> None:
        """Make stable what has changed since the last time, and nothing that was lost before."""
        stable = bytearray(self.stable)
        for offset, piece in self.changes:
            if piece is None:
                del stable[offset:]
            else:
                _put(stable, offset, piece)
        self.stable = bytes(stable)
        self.changes.clear()

    def settle(self) -> None:
        """Make all stable that can be read now."""
        self.stable = bytes(self.data)
        self.changes.clear()

    def lose_power(self, random: Random) -> None:
        """Keep what is stable, and any part of the rest."""
        data = bytearray(self.stable)
        for offset, piece in self.changes:
            fate = random.random()
            if fate < 0.3:  # It never came.
                continue
            if piece is None:
                del data[offset:]
            elif fate < 0.7:  # Only some sectors came, the length with or without them.
                if random.random() < 0.5:
                    _put(data, offset + len(piece), b"")
                for begin in range(0, len(piece), SECTOR_BYTES):
                    if random.random() < 0.5:
                        _put(data, offset + begin, piece[begin : begin + SECTOR_BYTES])
            else:
                _put(data, offset, piece)
        self.data = data
        self.settle()


class Directory:
    """A directory's names: as the system sees them, and as they are on stable storage."""

    def __init__(self) -> None:
        self.names: dict[str, Node | Directory] = {}
        self.stable: dict[str, Node | Directory] = {}
        self.changes: list[tuple[str | None, str, Node | Directory | None]] = []
        """Since the last sync: a name that goes, and one that comes (with what) or goes."""

    def change(self, gone: str | None, name: str, node: Node | Directory | None) -> None:
        """Let names come and go, in one."""
        _change(self.names, gone, name, node)
        self.changes.append((gone, name, node))

    def sync(self) -> None:
        """Make it stable."""
        self.stable = dict(self.names)
        self.changes.clear()

    def lose_power(self, random: Random) -> None:
        """Keep what is stable, and any of the changes since, each whole or not at all."""
        names = dict(self.stable)
        for gone, name, node in self.changes:
            if random.random() < 0.6:
                _change(names, gone, name, node)
        self.names = names
        self.sync()
        for node in names.values():
            node.lose_power(random)


class MemoryFile:
    """See File."""

    def __init__(self, path: str, node: Node, disk: MemoryDisk) -> None:
        self.path = path
        self.node = node
        self._disk = disk
        self.failed = False
        """Whether the next sync tells that it has lost what was written."""
        self.closed = False

    def size(self) -> int:
        """See File."""
        return len(self.node.data)

    def read_at(self, offset: int, target: memoryview) -> int:
        """See File."""
        self._use("read")
        piece = self.node.data[offset : offset + len(target)]
        target[: len(piece)] = piece
        return len(piece)

    def write_at(self, offset: int, pieces: Sequence[memoryview | bytes]) -> None:
        """See File."""
        data = b"".join(pieces)
        grown = offset + len(data) - len(self.node.data)
        room = max(0, self._disk.capacity - self._disk.used_bytes)
        if grown > room:  # What fits is written, and then there is no room.
            self.node.write(offset, data[: len(data) - grown + room])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            self._use("write")
        except CrashError:
            # A process that is killed leaves the beginning of what it was writing.
            self.node.write(offset, data[: self._disk.random.randrange(len(data) + 1)])
            raise
        self.node.write(offset, data)

    def truncate(self, byte_count: int) -> None:
        """See File."""
        self._use("truncate")
        self.node.truncate(byte_count)

    def sync(self) -> None:
        """See File."""
        try:
            self._use("sync")
        except OSError:
            # The system forgets what it could not write, and says so once.
            self.node.changes.clear()
            raise
        self.node.sync()

    def close(self) -> None:
        """See File."""
        self.closed = True

    def _use(self, what: str) -> None:
        assert not self.closed, f"{self.path} is closed"
        self._disk.use(f"{what} {self.path}")


class MemoryDisk:
    """See Disk.

    ``before`` is called with every operation, "sync sessions/.../head.json", and may raise: an
    OSError as a disk does, or CrashError, after which nothing but lose_power() and restart() works.
    """

    def __init__(self, random: Random | None = None, *, capacity: int = 1 << 40) -> None:
        self.random = random or Random(0)
        self.capacity = capacity
        self.before: Callable[[str], None] = lambda _: None
        self.operations: list[str] = []
        self.is_locked = False
        self._root = Directory()
        self._boots = 0
        self._crashed = False

    @property
    def boot(self) -> str:
        """See Disk."""
        return f"boot-{self._boots}"

    @property
    def used_bytes(self) -> int:
        """Size of all files."""
        return sum(len(node.data) for node in _nodes(self._root))

    @property
    def free_bytes(self) -> int:
        """See Disk."""
        return max(0, self.capacity - self.used_bytes)

    def use(self, operation: str) -> None:
        """Take note of an operation, unless everything has stopped."""
        if self._crashed:
            raise CrashError
        self.operations.append(operation)
        try:
            self.before(operation)
        except CrashError:
            self._crashed = True
            raise

    def restart(self) -> None:
        """End the process that used it, and let another one begin."""
        self._crashed = False
        self.is_locked = False
        self.before = lambda _: None
        self.operations = []

    def lose_power(self) -> None:
        """Cut the machine off, and let it come back."""
        self._root.lose_power(self.random)
        self._boots += 1
        self.restart()

    def read(self, path: str) -> bytes:
        """Return what is in a file, for a test to look at."""
        return bytes(self._node(path).data)

    def damage(self, path: str, offset: int, mask: int = 1) -> None:
        """Flip bits of a byte, on stable storage, too."""
        node = self._node(path)
        node.data[offset] ^= mask
        node.settle()

    def overwrite(self, path: str, data: bytes) -> None:
        """Put other bytes into the place of a file's."""
        node = self._node(path)
        node.data = bytearray(data)
        node.settle()

    def lock(self) -> None:
        """See Disk."""
        self.use("lock")
        if self.is_locked:
            raise StorageBusyError("another server uses the data directory")
        self.is_locked = True

    def close(self) -> None:
        """See Disk."""
        self.is_locked = False

    def create(self, path: str) -> MemoryFile:
        """See Disk."""
        self.use(f"create {path}")
        parent, name = self._parent(path)
        if name in parent.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        node = Node()
        parent.change(None, name, node)
        return MemoryFile(path, node, self)

    def open(self, path: str) -> MemoryFile:
        """See Disk."""
        self.use(f"open {path}")
        return MemoryFile(path, self._node(path), self)

    def make_directory(self, path: str) -> None:
        """See Disk."""
        self.use(f"make {path}")
        parent, name = self._parent(path)
        if name in parent.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        parent.change(None, name, Directory())

    def entries(self, path: str) -> Sequence[Entry]:
        """See Disk."""
        self.use(f"list {path}")
        return [
            Entry(name=name, byte_count=len(node.data) if isinstance(node, Node) else None)
            for name, node in self._directory(path).names.items()
        ]

    def rename(self, source: str, target: str) -> None:
        """See Disk."""
        self.use(f"rename {source}")
        parent, name = self._parent(source)
        other, target_name = self._parent(target)
        assert parent is other, "a rename from one directory to another is not atomic everywhere"
        there = parent.names.get(target_name)
        if isinstance(there, Directory) and there.names:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), target)
        if name not in parent.names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), source)
        parent.change(name, target_name, parent.names[name])

    def remove(self, path: str) -> None:
        """See Disk."""
        self._node(path)
        self.use(f"remove {path}")
        parent, name = self._parent(path)
        parent.change(None, name, None)

    def remove_directory(self, path: str) -> None:
        """See Disk."""
        self.use(f"remove {path}")
        if self._directory(path).names:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        parent, name = self._parent(path)
        parent.change(None, name, None)

    def sync_directory(self, path: str) -> None:
        """See Disk."""
        self.use(f"sync {path or '.'}/")
        self._directory(path).sync()

    def sync_files(self, files: Sequence[File]) -> Mapping[File, OSError]:
        """See Disk."""
        failed = {}
        for file in files:
            try:
                file.sync()
            except OSError as error:
                failed[file] = error
        return failed

    def _directory(self, path: str) -> Directory:
        found: Node | Directory | None = self._root
        for name in path.split("/") if path else ():
            found = found.names.get(name) if isinstance(found, Directory) else None
        if not isinstance(found, Directory):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return found

    def _parent(self, path: str) -> tuple[Directory, str]:
        parent, _, name = path.rpartition("/")
        return self._directory(parent), name

    def _node(self, path: str) -> Node:
        parent, name = self._parent(path)
        node = parent.names.get(name)
        if not isinstance(node, Node):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return node


@contextmanager
def broken(disk: MemoryDisk, *operations: str) -> Iterator[None]:
    """Have a disk fail in operations that begin so, for a block."""

    def fail(operation: str) -> None:
        if operation.startswith(operations):
            raise OSError(errno.EIO, "the disk is broken")

    disk.before = fail
    try:
        yield
    finally:
        disk.before = lambda _: None


def _put(data: bytearray, offset: int, piece: bytes) -> None:
    """Write into ``data``; what was never written reads as zeros."""
    if offset > len(data):
        data.extend(bytes(offset - len(data)))
    data[offset : offset + len(piece)] = piece


def _change(
    names: dict[str, Node | Directory],
    gone: str | None,
    name: str,
    node: Node | Directory | None,
) -> None:
    if gone is not None:
        names.pop(gone, None)
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def _nodes(directory: Directory) -> list[Node]:
    found = []
    for node in directory.names.values():
        found.extend([node] if isinstance(node, Node) else _nodes(node))
    return found
