"""A session's journal: appended to in order, synced in groups, pruned from its beginning."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

from optserve_server.core.storage import Origin, Record, StorageFailedError
from optserve_server.storage.commits import Commits, Unsynced
from optserve_server.storage.disk import Disk, File, translated
from optserve_server.storage.places import Segment, segment_name
from optserve_server.storage.reader import JournalReader
from optserve_server.storage.segment import Header, boot_tag, encode_header, encode_record


class Journal:
    """The journal of one session.

    One thread appends; others may sync and prune meanwhile. The lock guards what they share, and is
    never held while the disk works.
    """

    def __init__(
        self,
        disk: Disk,
        directory: str,
        session_id: str,
        *,
        origin: Origin,
        commits: Commits,
        segment_bytes_max: int,
        sequence: int,
    ) -> None:
        """Go on behind record ``sequence``, in a directory without segments; or load() them."""
        self._disk = disk
        self._directory = directory
        self._session_id = session_id
        self._origin = origin
        self._commits = commits
        self._tag = boot_tag(disk.boot)
        self._segment_bytes_max = segment_bytes_max
        self._lock = threading.Lock()
        self._segments: list[Segment] = []
        self._sequence = sequence
        self._durable = sequence
        self._file: File | None = None  # The last segment's, once this process has begun one.
        self._unsynced: list[File] = []  # Sealed ones that may have unsynced bytes, and that file.
        self._names_unsynced = False
        self._torn = False  # Whether there may be half a record at the end.
        self._seal_next = False
        self._failure: StorageFailedError | None = None

    @property
    def sequence(self) -> int:
        """Number of the last record."""
        return self._sequence

    @property
    def durable(self) -> int:
        """Number of the last record that is on stable storage."""
        return self._durable

    @property
    def byte_count(self) -> int:
        """Size of all segments."""
        with self._lock:
            return sum(segment.byte_count for segment in self._segments)

    def load(
        self, segments: Sequence[Segment], after: int
    ) -> tuple[Iterator[Record], frozenset[Origin]]:
        """Return the records behind number ``after``, and who wrote them; see Loaded.

        Args:
            segments: What is there, in order.
            after: What the snapshot contains.
        """
        reader = JournalReader(self._disk, self._session_id, segments, after)
        self._sequence = self._durable = after
        self._segments = list(segments)

        def records() -> Iterator[Record]:
            for record in reader.records():
                self._sequence = record.sequence
                yield record
                del record  # Before the next one is read.
            # What was read is on stable storage now, and what was cut off will not come back.
            self._segments = reader.segments
            self._durable = self._sequence

        return records(), reader.origins()

    def append(self, record: Record) -> int:
        """Write a record behind the others; see SessionStore.append."""
        assert record.sequence == self._sequence + 1, "the session's numbers have no gaps"
        self._check_working()
        pieces, byte_count = encode_record(record, self._durable, self._tag)
        segment, file = self._writable(record.sequence, byte_count)
        if self._torn:
            self._cut(segment, file)
        try:
            with translated(segment.path):
                file.write_at(segment.byte_count, pieces)
        except BaseException:
            self._torn = True
            self._cut(segment, file)
            raise
        with self._lock:
            segment.byte_count += byte_count
            self._sequence = record.sequence
        return byte_count

    def skip_to(self, sequence: int) -> None:
        """Go on behind ``sequence``, which a snapshot contains, if the journal has not come so far.

        The session's changes up to there were not written.
        """
        with self._lock:
            self._sequence = max(self._sequence, sequence)
            self._durable = max(self._durable, sequence)

    def seal(self) -> None:
        """Begin a new segment with the next record."""
        self._seal_next = True

    def commit(self) -> Future[None]:
        """Have what was appended put onto stable storage; see SessionStore.commit."""
        with self._lock:
            done: Future[None] = Future()
            if self._failure is not None:
                done.set_exception(self._failure)
                return done
            if self._is_synced:
                done.set_result(None)
                return done
        return self._commits.submit(self)

    def begin_sync(self) -> Unsynced:
        """See Committing."""
        with self._lock:
            # If it has been done already, the files may be closed at any time.
            files = [] if self._is_synced else self._unsynced
            return Unsynced(
                sequence=self._sequence,
                name=self._directory,
                files=tuple(files),
                sealed=tuple(file for file in files if file is not self._file),
                directory=self._directory if self._names_unsynced else None,
            )

    def end_sync(self, synced: Unsynced, error: StorageFailedError | None) -> None:
        """See Committing."""
        with self._lock:
            if error is not None:
                self._failure = error
                return
            self._durable = max(self._durable, synced.sequence)
            if synced.directory is not None and self._file in synced.files:
                self._names_unsynced = False  # Else there is a newer name, which came too late.
            self._unsynced = [file for file in self._unsynced if file not in synced.sealed]
        _let_go(synced.sealed)

    def prune(self, after: int) -> None:
        """Remove the segments whose records all have a number of at most ``after``."""
        with self._lock:
            keep = 0
            while keep + 1 < len(self._segments) and self._segments[keep + 1].first <= after + 1:
                keep += 1
            removed, self._segments = self._segments[:keep], self._segments[keep:]
        with translated(self._directory):
            for segment in removed:
                self._disk.remove(segment.path)

    def close(self) -> None:
        """Sync what was appended, and let go of the files."""
        try:
            self.commit().result()
        finally:
            with self._lock:
                files, self._unsynced, self._file = self._unsynced, [], None
                self._failure = self._failure or StorageFailedError(f"{self._directory} is closed")
            _let_go(files)

    @property
    def _is_synced(self) -> bool:
        return self._durable >= self._sequence and not self._names_unsynced

    def _check_working(self) -> None:
        if self._failure is not None:
            raise StorageFailedError(str(self._failure)) from self._failure

    def _writable(self, sequence: int, byte_count: int) -> tuple[Segment, File]:
        """Return where the next record goes: the open segment, or a new one."""
        if self._file is not None:
            segment = self._segments[-1]
            fits = segment.byte_count + byte_count <= self._segment_bytes_max
            if segment.first == sequence or (fits and not self._seal_next):
                return segment, self._file
        return self._begin_segment(sequence)

    def _begin_segment(self, first: int) -> tuple[Segment, File]:
        path = f"{self._directory}/{segment_name(first)}"
        header = encode_header(
            Header(
                session_id=self._session_id, origin=self._origin, boot=self._disk.boot, first=first
            )
        )
        with translated(path):
            file = self._disk.create(path)
            try:
                file.write_at(0, [header])
            except BaseException:
                file.close()
                self._disk.remove(path)
                raise
        segment = Segment(first=first, path=path, byte_count=len(header))
        with self._lock:
            sealed = self._file is not None
            self._file = file
            self._segments.append(segment)
            self._unsynced.append(file)
            self._names_unsynced = True
            self._seal_next = False
        if sealed:
            self._commits.submit(self)  # Nobody waits; the sealed file is closed when it is done.
        return segment, file

    def _cut(self, segment: Segment, file: File) -> None:
        """Cut half a record off the end; until that works, nothing is appended."""
        with translated(segment.path):
            file.truncate(segment.byte_count)
        self._torn = False


def _let_go(files: Sequence[File]) -> None:
    """Close files that have been synced: what closing tells on a network's disk is no news."""
    for file in files:
        with contextlib.suppress(OSError):
            file.close()
