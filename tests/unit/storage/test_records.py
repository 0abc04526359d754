"""What is written comes back bit for bit, or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import struct

import pytest
import safetensors.torch
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from unit.storage.sessions import ORIGIN, assert_same_record, assert_same_tensor, record_of

from optserve_server.core.safetensors import decode_tensors, encode_tensors
from optserve_server.core.storage import (
    DamagedError,
    Json,
    Record,
    RecordKind,
    StorageVersionError,
)
from optserve_server.storage.document import decode_document, encode_document
from optserve_server.storage.reader import BytesSource, read_segment
from optserve_server.storage.segment import (
    HEAD_BYTES,
    Header,
    boot_tag,
    encode_header,
    encode_record,
)
from optserve_server.storage.snapshot import decode_manifest
from optserve_server.storage.tensors import DTYPES

HEADER = Header(session_id="5e55", origin=ORIGIN, boot="one", first=1)
SHAPES = [(), (0,), (1,), (3, 5), (2, 0, 4), (1, 1, 1, 1), (40_000,)]

FACTS = st.dictionaries(
    st.text(),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


def segment(*records: Record) -> bytes:
    """Return the bytes of a segment."""
    encoded = (encode_record(record, 0, boot_tag("one"))[0] for record in records)
    return encode_header(HEADER) + b"".join(piece for pieces in encoded for piece in pieces)


def read(data: bytes) -> list[Record]:
    """Return the records of a segment."""
    header, records, _ = read_segment(BytesSource("segment", data))
    assert header == HEADER
    return records


@pytest.mark.parametrize("dtype", [dtype for _, dtype in DTYPES], ids=lambda dtype: str(dtype)[6:])
def test_tensor_of_any_type_and_shape_comes_back(dtype: torch.dtype) -> None:
    tensors = []
    for position, shape in enumerate(SHAPES):
        data = torch.randint(0, 2, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
        tensors.append((position, data.view(dtype).reshape(shape)))
    record = Record(sequence=1, kind=RecordKind.STEP, tensors=tensors)
    (came,) = read(segment(record))
    assert_same_record(came, record)
    for _, tensor in came.tensors:
        assert tensor.is_contiguous()
        assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0


def test_tensor_that_came_back_may_be_changed() -> None:
    (came,) = read(segment(record_of(1)))
    came.tensors[0][1].add_(1)
    came.tensors[-1][1].zero_()


@given(facts=FACTS)
def test_facts_come_back(facts: dict[str, Json]) -> None:
    (came,) = read(segment(Record(sequence=1, kind=RecordKind.CHANGE, facts=facts)))
    assert repr(came.facts) == repr(facts)  # As text: a NaN is not equal to itself.


@given(facts=FACTS)
def test_documents_come_back(facts: dict[str, Json]) -> None:
    content = {"facts": facts}
    assert repr(decode_document("it", encode_document(content))) == repr(content)


def test_size_that_is_told_is_the_size_that_is_written() -> None:
    for sequence in range(1, 20):
        pieces, byte_count = encode_record(record_of(sequence), 0, 0)
        assert byte_count == sum(len(piece) for piece in pieces)
        assert byte_count % 64 == 0


def test_segment_that_ends_anywhere_holds_the_records_before() -> None:
    ends = [len(segment(*map(record_of, range(1, last + 1)))) for last in range(4)]
    whole = segment(*map(record_of, range(1, 4)))
    for end in range(len(encode_header(HEADER).rstrip(b"\0"))):
        with pytest.raises(DamagedError):
            read(whole[:end])
    for end in range(ends[0], len(whole)):
        records = read(whole[:end])
        # What rounds the last one up to its alignment is not missed.
        assert len(records) - sum(each <= end for each in ends[1:]) in (0, 1)
        for number, came in enumerate(records, 1):
            assert_same_record(came, record_of(number))


def test_no_flipped_bit_gives_another_record() -> None:
    whole = segment(*map(record_of, range(1, 4)))
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        try:
            records = read(bytes(data))
        except (DamagedError, StorageVersionError):
            continue
        for number, came in enumerate(records, 1):
            assert_same_record(came, record_of(number))


@given(data=st.binary(max_size=400))
def test_no_bytes_crash_the_readers(data: bytes) -> None:
    with pytest.raises(DamagedError):
        read_segment(BytesSource("segment", data))
    assert read_segment(BytesSource("segment", encode_header(HEADER) + data))[1] == []
    with pytest.raises(DamagedError):
        decode_manifest("manifest", data)
    with pytest.raises(DamagedError):
        decode_tensors("tensors", len(data), io.BytesIO(data).readinto)


@given(changes=st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=4))
def test_no_forged_record_crashes_the_reader(changes: list[tuple[int, int]]) -> None:
    """Checksums keep accidents away, not people."""
    (record,) = encode_record(record_of(2), 0, 0)[0]
    head, body = bytearray(record[:HEAD_BYTES]), bytearray(record[HEAD_BYTES:])
    (length,) = struct.unpack_from("<Q", head, 32)
    for position, value in changes:
        if position < 8:
            head[24 + position] = value  # How long the facts are, and how many the tensors.
        else:
            body[position - 8] = value
    head[40:56] = xxhash.xxh3_128_digest(body[:length])
    head[56:] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(head[:56])))
    header = encode_header(dataclasses.replace(HEADER, first=2))
    with contextlib.suppress(DamagedError, StorageVersionError):
        read_segment(BytesSource("segment", header + head + body))


def test_snapshot_is_a_safetensors_file() -> None:
    tensors = {f"tensor {number}": torch.ones(3, 2).to(dtype) for number, dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 7), "ä": torch.zeros(1)}
    data = b"".join(encode_tensors(tensors))
    theirs = safetensors.torch.load(data)
    ours = decode_tensors("tensors", len(data), io.BytesIO(data).readinto)
    for read_back in (theirs, ours):
        assert read_back.keys() == tensors.keys()
        for name, tensor in read_back.items():
            assert_same_tensor(tensor, tensors[name])
