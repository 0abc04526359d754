"""Reading a journal back: what is whole, what was cut off by a crash, and what is damaged.

A process that is killed leaves the beginning of its last record, and nothing behind it. A power
loss may leave anything of what had not been synced: holes, zeros, later records without earlier
ones. So what is wrong at the end of a journal is a torn tail, and is cut off,

- if power cannot have been lost since (Disk.boot is the writer's): where the file ends too early,
- otherwise: where no record behind it says that this one was on stable storage already.

All else is damage. A session with damage is refused: its acknowledged steps are not there.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from optserve_server.core.storage import DamagedError, Origin, Record
from optserve_server.storage.disk import Disk, File, translated
from optserve_server.storage.places import Segment
from optserve_server.storage.segment import (
    HEAD_BYTES,
    Head,
    Header,
    Source,
    boot_tag,
    decode_record,
    read_body,
    read_head,
    read_header,
    whole_heads,
)

_logger = logging.getLogger(__name__)

_AGAIN_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class BytesSource:
    """Bytes in memory, to be read like a file."""

    path: str
    data: bytes

    def size(self) -> int:
        """See Source."""
        return len(self.data)

    def read_at(self, offset: int, target: memoryview) -> int:
        """See Source."""
        piece = self.data[offset : offset + len(target)]
        target[: len(piece)] = piece
        return len(piece)


def read_segment(source: Source) -> tuple[Header, list[Record], int]:
    """Return what is in a segment, up to where it is not whole any more.

    Returns:
        Its header, its records, and where they end.

    Raises:
        DamagedError: The header is none, or checksums hold over what is no record.
        StorageVersionError: A newer server wrote it.
    """
    header, offset = read_header(source)
    records: list[Record] = []
    while head := _head(source, offset, header.first + len(records)):
        data = read_body(source, offset, head)
        if data is None:
            break
        records.append(decode_record(source.path, offset, head, data))
        offset += head.byte_count
    return header, records, min(offset, source.size())


class JournalReader:
    """Reads the records behind a snapshot, once, and puts right what a crash has left."""

    def __init__(
        self, disk: Disk, session_id: str, segments: Sequence[Segment], after: int
    ) -> None:
        """Read behind record ``after``.

        Args:
            disk: Where they are.
            session_id: Whose they must be.
            segments: All that there are, in order.
            after: What the snapshot contains.
        """
        self._disk = disk
        self._session_id = session_id
        self._after = after
        self.segments = list(segments)
        """What is there; after reading, what is left."""
        # The last one that may hold the next record, and what follows. The others are older.
        begin = sum(segment.first <= after + 1 for segment in segments) - 1
        self._begin = max(begin, 0)
        self._durable = after  # No snapshot is ahead of its journal on stable storage.

    def origins(self) -> frozenset[Origin]:
        """Return who wrote the records behind the snapshot."""
        return frozenset(self._origins())

    def records(self) -> Iterator[Record]:
        """Yield the records behind the snapshot; see Loaded.records."""
        position = self._begin
        expected = self.segments[position].first if self.segments else 0
        if expected > self._after + 1:
            what = f"record {self._after + 1} is missing; the journal begins with {expected}"
            expected = self._after + 1
            header = self._header(position)
            damage = DamagedError(self.segments[position].path, 0, what)
            self._cut(position, 0, header, expected, damage)
        while position < len(self.segments):
            segment = self.segments[position]
            with self._opened(position) as file:
                expected = yield from self._segment(file, position, expected)
                file.sync()  # A killed process has left that to us.
            if expected > segment.first:
                position += 1
            else:  # Nothing is in it, and the next record's segment will have its name.
                with translated(segment.path):
                    self._disk.remove(segment.path)
                del self.segments[position]
        self._write_again()
        if self.segments:
            directory = self.segments[0].path.rpartition("/")[0]
            with translated(directory):
                self._disk.sync_directory(directory)

    def _write_again(self) -> None:
        """Write once more what may be nowhere but in the system's memory, and sync it.

        What a failed sync could not write is shown as if it had been written, and no later sync
        writes it. Records that a later one calls synced are not concerned; nor is what another boot
        has left, which comes from the disk.
        """
        for position in range(self._begin, len(self.segments)):
            behind = self.segments[position + 1 :]
            if behind and behind[0].first <= self._durable + 1:
                continue
            with self._opened(position) as file:
                header, offset = read_header(file)
                if header.boot != self._disk.boot:
                    continue
                expected = header.first
                if expected > self._durable:
                    offset = 0
                while (head := _head(file, offset, expected)) and expected <= self._durable:
                    offset += head.byte_count
                    expected += 1
                for begin in range(offset, file.size(), _AGAIN_BYTES):
                    piece = memoryview(bytearray(min(_AGAIN_BYTES, file.size() - begin)))
                    file.read_at(begin, piece)
                    file.write_at(begin, [piece])
                file.sync()

    def _header(self, position: int) -> Header | None:
        """Return the header of a segment, unless it is damaged."""
        with self._opened(position) as file:
            try:
                return read_header(file)[0]
            except DamagedError:
                return None

    @contextmanager
    def _opened(self, position: int) -> Iterator[File]:
        path = self.segments[position].path
        with translated(path):
            file = self._disk.open(path)
            try:
                yield file
            finally:
                file.close()

    def _origins(self) -> Iterator[Origin]:
        for position in range(self._begin, len(self.segments)):
            with self._opened(position) as file:
                try:
                    header, offset = read_header(file)
                except DamagedError:
                    continue  # It is met again when it is read.
                # All but the last one have records behind the snapshot, or another would be first.
                is_last = position + 1 == len(self.segments)
                if not is_last or self._has_news(file, offset, header.first):
                    yield header.origin

    def _has_news(self, file: File, offset: int, expected: int) -> bool:
        """Return whether a segment has a record behind the snapshot."""
        while (head := _head(file, offset, expected)) and head.sequence <= self._after:
            offset += head.byte_count
            expected += 1
        return head is not None and read_body(file, offset, head) is not None

    def _segment(self, file: File, position: int, expected: int) -> Generator[Record, None, int]:
        """Yield the records of a segment; return the number of the next one."""
        segment = self.segments[position]
        try:
            header, offset = read_header(file)
        except DamagedError as error:
            self._cut(position, 0, None, expected, error)
            return expected
        if (header.session_id, header.first) != (self._session_id, segment.first):
            what = f"it belongs to session {header.session_id}, from record {header.first} on"
            raise DamagedError(segment.path, 0, what)
        while True:
            head = _head(file, offset, expected)
            if head is not None and head.sequence > self._after:
                self._durable = max(self._durable, head.durable)
                data = read_body(file, offset, head)
                if data is None:
                    head = None
                else:
                    record = decode_record(segment.path, offset, head, data)
                    yield record
                    del record, data  # One at a time is in memory.
            if head is not None:
                offset += head.byte_count
                expected += 1
            elif offset >= segment.byte_count and self._is_followed(position, expected):
                return expected
            elif (resumed := self._resumed(file, offset, expected)) is not None:
                offset, expected = resumed
            else:
                what = f"record {expected} is not what was written"
                damage = DamagedError(segment.path, offset, what)
                self._cut(position, offset, header, expected, damage)
                return expected

    def _is_followed(self, position: int, expected: int) -> bool:
        """Return whether a segment that has been read to its end has the right one behind it."""
        behind = self.segments[position + 1 :]
        return not behind or behind[0].first == expected

    def _resumed(self, file: File, offset: int, expected: int) -> tuple[int, int] | None:
        """Return where to go on behind damage that the snapshot makes up for."""
        if expected <= self._after:
            for place, head in whole_heads(file, offset):
                if expected < head.sequence <= self._after + 1:
                    return place, head.sequence
        return None

    def _cut(
        self,
        position: int,
        offset: int,
        header: Header | None,
        expected: int,
        damage: DamagedError,
    ) -> None:
        """Cut off what is not whole from ``offset`` on, if a crash explains it.

        Raises:
            DamagedError: ``damage``: nothing explains it.
        """
        if not self._is_torn(position, offset, header, expected):
            raise damage
        segment, behind = self.segments[position], self.segments[position + 1 :]
        cut_bytes = segment.byte_count - offset + sum(each.byte_count for each in behind)
        if cut_bytes > 0:
            _logger.warning(
                "%s: cut %d bytes behind record %d, which a crash has left unfinished",
                *(segment.path, cut_bytes, expected - 1),
            )
        with self._opened(position) as file:
            for each in reversed(behind):
                self._disk.remove(each.path)
            file.truncate(offset)
        del self.segments[position + 1 :]
        segment.byte_count = min(offset, segment.byte_count)

    def _is_torn(self, position: int, offset: int, header: Header | None, expected: int) -> bool:
        """Return whether a crash explains that record ``expected`` is not at ``offset``."""
        boot = self._disk.boot
        if header is None:
            tag = boot_tag(boot)
            same_boot = any(head.boot_tag == tag for head in self._behind(position, offset))
        else:
            same_boot = header.boot == boot
        if not same_boot:
            return all(head.durable < expected for head in self._behind(position, offset))
        if header is None or position + 1 < len(self.segments):
            return False
        with self._opened(position) as file:
            return _is_short(file, offset, expected)

    def _behind(self, position: int, offset: int) -> Iterator[Head]:
        """Yield the heads of the whole records behind a place."""
        for each in range(position, len(self.segments)):
            with self._opened(each) as file:
                yield from (head for _, head in whole_heads(file, offset))
            offset = 0


def _head(source: Source, offset: int, expected: int) -> Head | None:
    """Return the head of record ``expected``; None if it is not what is there."""
    head = read_head(source, offset)
    return head if head is not None and head.sequence == expected else None


def _is_short(source: Source, offset: int, expected: int) -> bool:
    """Return whether a file ends in the middle of the record at ``offset``."""
    left = source.size() - offset
    if left < HEAD_BYTES:
        return True
    head = _head(source, offset, expected)
    return head is not None and left < HEAD_BYTES + head.body_bytes
