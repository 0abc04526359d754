"""Archives to be tried: a store that may fail, and a data directory to be kept in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from faults.disks import MemoryDisk
from unit.storage.sessions import SESSION, append, begun, snapshot_of, stored

from optserve_server.core.storage import CheckpointKey
from optserve_server.storage.archive import ArchiveError, restore_if_empty

KEY = CheckpointKey(tenant="ours", session_id=SESSION, name="best")


class Store:
    """Names with bytes behind them, which may fail."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.writes_left = 1 << 30

    def sizes(self) -> Mapping[str, int]:
        """See ObjectStore."""
        return {name: len(data) for name, data in self.objects.items()}

    def read(self, name: str) -> Iterator[bytes]:
        """See ObjectStore."""
        yield self.objects[name]

    def write(self, name: str, pieces: Iterator[bytes]) -> None:
        """See ObjectStore."""
        self.writes_left -= 1
        if self.writes_left < 0:
            raise ArchiveError("connection reset by peer")
        self.objects[name] = b"".join(pieces)

    def remove(self, name: str) -> None:
        """See ObjectStore."""
        del self.objects[name]


def trained(disk: MemoryDisk) -> None:
    """Leave two sessions, of 12 records with a snapshot after 5, and a checkpoint."""
    storage = stored(disk, segment_bytes_max=2500)
    for session_id in (SESSION, "07e5"):
        store = begun(storage, session_id)
        append(store, 5)
        store.save_snapshot(snapshot_of(5))
        append(store, 7)
        store.close()
    storage.save_checkpoint(KEY, {"steps": 3}, snapshot_of(3))
    storage.close()


def came_back(archive: Store) -> MemoryDisk:
    """Return what comes of an archive; of a copy, for an archive is its data directory's alone."""
    copy, disk = Store(), MemoryDisk()
    copy.objects = dict(archive.objects)
    restore_if_empty(copy, disk)
    return disk
