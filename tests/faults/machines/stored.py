"""What reads a data directory back, each with examples: bytes that a disk or somebody has changed.

Checksums refuse nearly all of that at once, so what stands behind them is fed on its own too.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch

from optserve_server.core.safetensors import decode_tensors, encode_tensors
from optserve_server.core.storage import Origin, Record, RecordKind, StorageError
from optserve_server.storage.document import decode_document, encode_document
from optserve_server.storage.reader import BytesSource, read_segment
from optserve_server.storage.segment import (
    HEAD_BYTES,
    Head,
    Header,
    boot_tag,
    decode_record,
    encode_header,
    encode_record,
    read_head,
)
from optserve_server.storage.snapshot import decode_manifest
from optserve_server.storage.tensors import aligned_bytes

_HEADER = Header(
    session_id="0" * 32, origin=Origin(torch="2.13.0", device="cpu"), boot="boot", first=1
)
_RECORDS = (
    Record(
        sequence=1,
        kind=RecordKind.STEP,
        facts={"step": 1, "gradient_norm": 0.5, "digests": ["00"]},
        tensors=[(0, torch.arange(3.0)), (1, torch.ones(2, 2, dtype=torch.bfloat16))],
    ),
    Record(sequence=2, kind=RecordKind.EPOCH, facts={"epoch": 1}),
)
_NUMBERS = struct.Struct("<BIB")  # Of a record's head: its kind, and how much of it is what.


def _joined(pieces: Sequence[memoryview | bytes]) -> bytes:
    return b"".join(pieces)


def _take_segment(data: bytes) -> None:
    with suppress(StorageError):
        read_segment(BytesSource("segment", data))


def _take_record(data: bytes) -> None:
    """Decode a record whose checksums hold, whatever they are of."""
    if len(data) < _NUMBERS.size:
        return
    kind, facts_bytes, tensor_count = _NUMBERS.unpack_from(data)
    body = data[_NUMBERS.size :]
    head = Head(
        sequence=1,
        kind=kind,
        durable=0,
        boot_tag=0,
        facts_bytes=facts_bytes,
        tensor_count=tensor_count,
        body_bytes=len(body),
        checksum=b"",
    )
    with suppress(StorageError):
        decode_record("segment", 0, head, _memory(bytes(HEAD_BYTES) + body))


def _take_tensors(data: bytes) -> None:
    with suppress(StorageError):
        decode_tensors("tensors", len(data), io.BytesIO(data).readinto)


def _take_documents(data: bytes) -> None:
    with suppress(StorageError):
        decode_document("head", data)
    with suppress(StorageError):
        decode_manifest("manifest", data)


def _memory(data: bytes) -> torch.Tensor:
    memory = aligned_bytes(len(data))
    if data:
        memory.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return memory


def _records() -> list[bytes]:
    return [_joined(encode_record(record, 0, boot_tag("boot"))[0]) for record in _RECORDS]


def _record_bodies() -> list[bytes]:
    found = []
    for record in _records():
        head = read_head(BytesSource("segment", record), 0)
        assert head is not None
        numbers = _NUMBERS.pack(head.kind, head.facts_bytes, head.tensor_count)
        found.append(numbers + record[HEAD_BYTES : HEAD_BYTES + head.body_bytes])
    return found


STORED: Mapping[str, tuple[Sequence[bytes], Callable[[bytes], None]]] = {
    "segments": ([encode_header(_HEADER) + b"".join(_records())], _take_segment),
    "records": (_record_bodies(), _take_record),
    "tensors": (
        [_joined(encode_tensors({"a": torch.arange(3.0), "b": torch.zeros(0, 2)}))],
        _take_tensors,
    ),
    "documents": ([encode_document({"a": [1, 2.5, None], "b": {"c": "d"}})], _take_documents),
}
"""Examples and readers, by what they read."""
