"""A segment of a journal: a file with a header, and records one behind the other.

    header   magic "OPTSVJNL", format, length, checksum | JSON: session, origin, boot, first number
    record   head (64 bytes, with a checksum of its own) | facts, tensors' headers, tensors
    record   ...

All numbers are little-endian, as is the tensors' memory. Each record begins at a multiple of 64
bytes, and each tensor in it does, so that what is read is aligned for any data type.

A checksum over the head alone lets a reader trust a length before it reads so much. Each record
also says how far the journal had been synced when it was written: that tells damage from a torn
tail.
"""

from __future__ import annotations

import ctypes
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from optserve_server.core.storage import (
    DamagedError,
    Origin,
    Record,
    RecordKind,
    StorageVersionError,
)
from optserve_server.core.tensors import byte_view
from optserve_server.storage import tensors as types

FORMAT = 1
ALIGNMENT = 64

_HEADER = struct.Struct("<8sIIQ")  # Magic, format, bytes of JSON, xxh3_64 of the JSON.
_HEADER_MAGIC = b"OPTSVJNL"
_HEADER_JSON_MAX = 4096

_HEAD = struct.Struct("<4sHHQQIIQ16s")  # Without its checksum, which is the last 8 bytes.
_MAGIC = b"OPRC"
_CHECKSUM = struct.Struct("<Q")
HEAD_BYTES = _HEAD.size + _CHECKSUM.size
_TENSOR = struct.Struct("<IBBH")  # Position, data type, number of dimensions, nothing.
_POSITION = struct.Struct("<I")

_JOINED_MAX = 64 << 10  # Up to here one copy into one buffer costs less than many pieces.
_ZEROS = bytes(ALIGNMENT)
_encode_facts = json.JSONEncoder(separators=(",", ":")).encode
_SEARCHED_BYTES = 1 << 20  # At once; a multiple of the alignment.


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a segment says of itself."""

    session_id: str
    origin: Origin
    boot: str
    """Since when power had not been lost, at the writer's; see Disk.boot."""
    first: int
    """Number of its first record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What stands in front of a record."""

    sequence: int
    kind: int
    durable: int
    """Number of the last record that was known to be on stable storage when this was written."""
    boot_tag: int
    """Tells since when power had not been lost, should the header be lost; see boot_tag()."""
    facts_bytes: int
    tensor_count: int
    body_bytes: int
    checksum: bytes
    """XXH3, 128 bits, of the body."""

    @property
    def byte_count(self) -> int:
        """Size of the whole record in the file."""
        return padded(HEAD_BYTES + self.body_bytes)


class Source(Protocol):
    """What can be read at any place: a file, or bytes in memory."""

    @property
    def path(self) -> str:
        """What to call it."""

    def size(self) -> int:
        """Return how many bytes it has."""

    def read_at(self, offset: int, target: memoryview) -> int:
        """Fill ``target`` from ``offset`` on; return how many bytes there were."""


def padded(byte_count: int) -> int:
    """Return ``byte_count`` rounded up to where something may begin."""
    return -(-byte_count // ALIGNMENT) * ALIGNMENT


def boot_tag(boot: str) -> int:
    """Return 16 bits that differ for another boot, but for once in 65,536."""
    return xxhash.xxh3_64_intdigest(boot.encode()) & 0xFFFF


def encode_header(header: Header) -> bytes:
    """Return the bytes that a segment begins with."""
    facts = {
        "session": header.session_id,
        "torch": header.origin.torch,
        "device": header.origin.device,
        "boot": header.boot,
        "first": header.first,
    }
    text = json.dumps(facts).encode()
    head = _HEADER.pack(_HEADER_MAGIC, FORMAT, len(text), xxhash.xxh3_64_intdigest(text))
    return (head + text).ljust(padded(len(head) + len(text)), b"\0")


def read_header(source: Source) -> tuple[Header, int]:
    """Return what a segment says of itself, and where its first record begins.

    Raises:
        DamagedError: It says nothing, or not what was written.
        StorageVersionError: A newer server wrote it.
    """
    head = _read(source, 0, _HEADER.size)
    if len(head) < _HEADER.size:
        raise DamagedError(source.path, len(head), "the file ends in its header")
    magic, format_, length, checksum = _HEADER.unpack(head)
    if magic != _HEADER_MAGIC or length > _HEADER_JSON_MAX:
        raise DamagedError(source.path, 0, "it is no journal")
    text = _read(source, _HEADER.size, length)
    if len(text) < length or xxhash.xxh3_64_intdigest(text) != checksum:
        raise DamagedError(source.path, _HEADER.size, "the header is not what was written")
    if format_ != FORMAT:
        raise StorageVersionError(f"{source.path} has format {format_}; this server knows {FORMAT}")
    facts = _facts(source.path, _HEADER.size, text)
    try:
        origin = Origin(torch=str(facts["torch"]), device=str(facts["device"]))
        header = Header(
            session_id=str(facts["session"]),
            origin=origin,
            boot=str(facts["boot"]),
            first=int(facts["first"]),
        )
    except (KeyError, TypeError, ValueError):
        raise DamagedError(source.path, _HEADER.size, "the header lacks something") from None
    return header, padded(_HEADER.size + length)


def encode_record(record: Record, durable: int, tag: int) -> tuple[list[memoryview | bytes], int]:
    """Return a record as pieces to be written one behind the other, and their size.

    Large tensors are not copied: the pieces are views of them.

    Args:
        record: What is to be written.
        durable: See Head.
        tag: Of Disk.boot.
    """
    facts = _encode_facts(dict(record.facts)).encode() if record.facts else b""
    headers = [
        _POSITION.pack(i) + _tensor_header(each.dtype, each.shape) for i, each in record.tensors
    ]
    meta = b"".join([facts, *headers])
    is_small = sum(tensor.nbytes for _, tensor in record.tensors) <= _JOINED_MAX
    pieces: list[memoryview | bytes] = [meta]
    end = HEAD_BYTES + len(meta)
    for _, tensor in record.tensors:
        piece = _copied(tensor) if is_small else byte_view(tensor)
        if end % ALIGNMENT:
            pieces.append(_ZEROS[: -end % ALIGNMENT])
        pieces.append(piece)
        end += -end % ALIGNMENT + len(piece)
    if is_small:
        pieces = [b"".join(pieces)]
    hasher = xxhash.xxh3_128()
    for piece in pieces:
        hasher.update(piece)
    head = _HEAD.pack(
        *(_MAGIC, record.kind, tag, record.sequence, durable),
        *(len(facts), len(record.tensors), end - HEAD_BYTES, hasher.digest()),
    )
    head += _CHECKSUM.pack(xxhash.xxh3_64_intdigest(head))
    padding = _ZEROS[: -end % ALIGNMENT]
    if len(pieces) == 1:
        return [head + pieces[0] + padding], padded(end)
    return [head, *pieces, padding], padded(end)


def read_head(source: Source, offset: int) -> Head | None:
    """Return the head of the record at ``offset``; None if there is no whole one."""
    data = _read(source, offset, HEAD_BYTES)
    if len(data) < HEAD_BYTES:
        return None
    magic, kind, tag, sequence, durable, facts, count, body, checksum = _HEAD.unpack_from(data)
    (check,) = _CHECKSUM.unpack_from(data, _HEAD.size)
    if magic != _MAGIC or check != xxhash.xxh3_64_intdigest(data[: _HEAD.size]):
        return None
    return Head(
        sequence=sequence,
        kind=kind,
        durable=durable,
        boot_tag=tag,
        facts_bytes=facts,
        tensor_count=count,
        body_bytes=body,
        checksum=checksum,
    )


def read_body(source: Source, offset: int, head: Head) -> Tensor | None:
    """Return the body of the record at ``offset``; None if it is not whole.

    Bytes, in memory of its own, that begin where the record does, so that all alignment holds.
    """
    if head.body_bytes > source.size() - offset - HEAD_BYTES:
        return None  # Before any memory is taken for it.
    data = types.aligned_bytes(HEAD_BYTES + head.body_bytes)
    body = byte_view(data)[HEAD_BYTES:]
    if source.read_at(offset + HEAD_BYTES, body) < head.body_bytes:
        return None
    return data if xxhash.xxh3_128_digest(body) == head.checksum else None


def decode_record(path: str, offset: int, head: Head, data: Tensor) -> Record:
    """Return the record that a head and a whole body are.

    Args:
        path: For the errors: the file.
        offset: For the errors: where in the file the record begins.
        head: Its head.
        data: From read_body(). The record's tensors are views of it.

    Raises:
        DamagedError: The checksums hold, and yet it is no record.
        StorageVersionError: It is of a kind that only a newer server knows.
    """
    view = byte_view(data)
    if head.kind not in set(RecordKind):
        raise StorageVersionError(f"{path}: byte {offset}: a record of unknown kind {head.kind}")
    end = HEAD_BYTES + head.facts_bytes
    if end > len(view):
        raise DamagedError(path, offset, "the facts are longer than the record")
    facts = _facts(path, offset, bytes(view[HEAD_BYTES:end])) if head.facts_bytes else {}
    shapes: list[tuple[int, Any, tuple[int, ...]]] = []
    for _ in range(head.tensor_count):
        if end + _TENSOR.size > len(view):
            raise DamagedError(path, offset, "the record ends in a tensor's header")
        position, number, dimensions, _ = _TENSOR.unpack_from(view, end)
        end += _TENSOR.size
        dtype = types.BY_NUMBER.get(number)
        if dtype is None or dimensions > types.DIMENSIONS_MAX:
            raise DamagedError(path, offset, "a tensor's header is none")
        if end + 8 * dimensions > len(view):
            raise DamagedError(path, offset, "the record ends in a tensor's shape")
        shapes.append((position, dtype, struct.unpack_from(f"<{dimensions}Q", view, end)))
        end += 8 * dimensions
    tensors = []
    for position, dtype, shape in shapes:
        begin = padded(end)
        end = begin + math.prod(shape) * dtype.itemsize
        if end > len(view):
            raise DamagedError(path, offset, "a tensor is longer than the record")
        try:
            tensors.append((position, data[begin:end].view(dtype).reshape(shape)))
        except (RuntimeError, TypeError):  # No elements, but more rows than torch can count.
            raise DamagedError(path, offset, "a tensor has an impossible shape") from None
    if end != len(view):
        raise DamagedError(path, offset, "the record is longer than what is in it")
    return Record(sequence=head.sequence, kind=RecordKind(head.kind), facts=facts, tensors=tensors)


def whole_heads(source: Source, offset: int) -> Iterator[tuple[int, Head]]:
    """Yield the whole records from ``offset`` on, with where they are, whatever is between them."""
    for begin in range(padded(offset), source.size(), _SEARCHED_BYTES):
        block = _read(source, begin, _SEARCHED_BYTES)
        found = block.find(_MAGIC)
        while found >= 0:
            head = None if found % ALIGNMENT else read_head(source, begin + found)
            if head is not None and read_body(source, begin + found, head) is not None:
                yield begin + found, head
            found = block.find(_MAGIC, found + 1)


@lru_cache(maxsize=4096)
def _tensor_header(dtype: torch.dtype, shape: torch.Size) -> bytes:
    """Return what stands behind a tensor's position: every step has the same ones."""
    return struct.pack(f"<BBH{len(shape)}Q", types.NUMBERS[dtype], len(shape), 0, *shape)


def _copied(tensor: Tensor) -> bytes:
    """Return a copy of a small tensor's bytes; by its address: a view takes five times as long."""
    assert tensor.is_contiguous(), "records have contiguous tensors"
    assert tensor.device.type == "cpu", "records have tensors on the CPU"
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def _facts(path: str, offset: int, text: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        raise DamagedError(path, offset, "the facts are no JSON") from None
    if not isinstance(facts, dict):
        raise DamagedError(path, offset, "the facts are no object")
    return facts


def _read(source: Source, offset: int, byte_count: int) -> bytes:
    data = bytearray(byte_count)
    return bytes(data[: source.read_at(offset, memoryview(data))])
