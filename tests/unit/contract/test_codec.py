"""Chunks by hand are what protobuf makes of them: whatever is encoded, whatever comes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeAlias

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import example, given
from hypothesis import strategies as st

from optserve.codec import ChunkCodec
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.error_pb2 import Refusal
from optserve.v1.session_pb2 import SessionStatus
from optserve.v1.tensor_pb2 import TensorChunk, TensorChunks
from optserve.wire import Chunk

Plain: TypeAlias = tuple[int, int, bytes]
"""A chunk as one can compare it."""

EVENTS: dict[str, type[Message]] = {
    name: message
    for name, message in vars(pb).items()
    if isinstance(message, type)
    and issubclass(message, Message)
    and "chunks" in message.DESCRIPTOR.fields_by_name
}
# One number of the field `chunks` is as good as another, and there are two.
REQUESTS, RESPONSES = ChunkCodec(pb.TrainRequest), ChunkCodec(pb.TrainResponse)
CHUNKS_TAG = pb.TrainRequest.DESCRIPTOR.fields_by_name["chunks"].number << 3 | 2

UINT32, UINT64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
# Numbers on either side of where a varint, or the table of tensors, ends; and all others.
TENSOR = st.sampled_from([0, 1, 127, 128, 255, 256, 16_383, 16_384, 2**32 - 1]) | UINT32
OFFSET = st.sampled_from([0, 1, 127, 128, 1 << 20, 2**32, 2**63, 2**64 - 1]) | UINT64
PLAINS = st.lists(st.tuples(TENSOR, OFFSET, st.binary(max_size=300)), max_size=5)


def parts_of(chunks: Sequence[Chunk] | Sequence[TensorChunk]) -> list[Plain]:
    return [(chunk.tensor, chunk.offset, bytes(chunk.data)) for chunk in chunks]


def message_of(event: type[Message], chunks: Sequence[Plain]) -> Message:
    wanted = TensorChunks(
        chunks=[TensorChunk(tensor=tensor, offset=at, data=data) for tensor, at, data in chunks]
    )
    message = event()
    getattr(message, "chunks").MergeFrom(wanted)  # noqa: B009 - Every event has it.
    getattr(message, "chunks").SetInParent()  # noqa: B009
    return message


def test_every_stream_of_tensors_is_proved_here() -> None:
    assert sorted(EVENTS) == [
        "DownloadParametersResponse",
        "EvaluateLossStreamRequest",
        "EvaluateLossStreamResponse",
        "TrainRequest",
        "TrainResponse",
        "UploadParametersRequest",
    ]


@given(event=st.sampled_from(list(EVENTS.values())), chunks=PLAINS)
def test_what_is_encoded_is_to_protobuf_the_same_and_byte_for_byte_its_own(
    event: type[Message], chunks: list[Plain]
) -> None:
    data = ChunkCodec(event).encode([Chunk(t, at, memoryview(d)) for t, at, d in chunks])
    # An empty chunk is sent as one, although it means nothing: protobuf would leave its data out.
    if all(each for _, _, each in chunks):
        assert data == message_of(event, chunks).SerializeToString()
    assert event.FromString(data) == message_of(event, chunks)


@given(event=st.sampled_from(list(EVENTS.values())), chunks=PLAINS)
def test_what_protobuf_encodes_is_decoded(event: type[Message], chunks: list[Plain]) -> None:
    decoded = ChunkCodec(event).decode(message_of(event, chunks).SerializeToString())
    assert isinstance(decoded, list)
    assert parts_of(decoded) == chunks


@given(chunks=PLAINS)
def test_what_is_encoded_is_decoded(chunks: list[Plain]) -> None:
    data = REQUESTS.encode([Chunk(t, at, memoryview(d)) for t, at, d in chunks])
    decoded = REQUESTS.decode(data)
    assert isinstance(decoded, list)
    assert parts_of(decoded) == chunks


def test_the_data_of_a_chunk_is_the_very_memory_that_came() -> None:
    data = REQUESTS.encode([Chunk(0, 0, memoryview(b"abc")), Chunk(300, 7, memoryview(b"d"))])
    decoded = REQUESTS.decode(data)
    assert isinstance(decoded, list)
    assert [chunk.data.obj for chunk in decoded] == [data, data]
    assert all(chunk.data.readonly for chunk in decoded)


MESSAGES: dict[str, Message] = {
    "nothing": pb.TrainRequest(),
    "begin": pb.TrainRequest(begin=pb.StepBegin(step=7, every_parameter=True)),
    "end": pb.TrainRequest(end=pb.StepEnd()),
    "packed": pb.TrainRequest(packed=pb.PackedStep(step=1, gradients=[b"abcd", b""])),
    "opened": pb.TrainResponse(opened=pb.TrainOpened(status=SessionStatus(steps=3))),
    "refused": pb.TrainResponse(refused=pb.StepRefused(refusal=Refusal(message="no"))),
}


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_events_that_are_no_chunks_are_protobufs(message: Message) -> None:
    codec: ChunkCodec[Message] = ChunkCodec(type(message))
    assert codec.encode(message) == message.SerializeToString()
    assert codec.decode(message.SerializeToString()) == message


def check_as_protobuf(codec: ChunkCodec[pb.TrainRequest], data: bytes) -> None:
    """Decode, and compare with what protobuf says: in all there is, or that it is nothing."""
    wanted: pb.TrainRequest | None = None
    with contextlib.suppress(DecodeError):
        wanted = pb.TrainRequest.FromString(data)
    if wanted is None:
        with pytest.raises(DecodeError):
            codec.decode(data)
        return
    decoded, parsed = codec.decode(data), codec.parse(data)
    if isinstance(decoded, list):
        assert wanted.WhichOneof("event") == "chunks"
        assert parts_of(decoded) == parts_of(wanted.chunks.chunks)
    else:
        assert decoded == wanted
    # What a list cannot hold, such as the fields of a newer client, is still to be seen.
    whole = message_of(pb.TrainRequest, parts_of(parsed)) if isinstance(parsed, list) else parsed
    assert whole == wanted
    assert whole.ByteSize() == wanted.ByteSize()


def varint(value: int, *, length: int = 0) -> bytes:
    """Write a number in at least ``length`` bytes."""
    parts = bytearray()
    while value > 0x7F or len(parts) + 1 < length:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def field(number: int, value: int | bytes, *, length: int = 0) -> bytes:
    """Write a field; its number, or its length, in at least ``length`` bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value, length=length)
    return varint(number << 3 | 2) + varint(len(value), length=length) + value


@st.composite
def loose_chunks(draw: st.DrawFn) -> bytes:
    """Return a TensorChunk in any order, with fields twice or not at all, and strange ones."""
    length = st.integers(0, 11)
    tensor = st.builds(field, st.just(1), st.integers(0, 2**70), length=length)
    offset = st.builds(field, st.just(2), st.integers(0, 2**70), length=length)
    data = st.builds(field, st.just(3), st.binary(max_size=9), length=length)
    strange = st.builds(field, st.integers(1, 20), st.integers(0, 2**64) | st.binary(max_size=3))
    parts = st.lists(tensor | offset | data | strange, max_size=5)
    return b"".join(draw(parts))


@st.composite
def loose_events(draw: st.DrawFn) -> bytes:
    """Return a TrainRequest with chunks, in any form that the wire format has for one or none."""
    length = st.integers(0, 11)
    chunk = st.builds(field, st.just(1), loose_chunks(), length=length)
    strange = st.builds(field, st.integers(1, 20), st.integers(0, 9) | st.binary(max_size=3))
    chunks = st.lists(chunk | strange, max_size=4).map(b"".join)
    event = st.builds(field, st.just(CHUNKS_TAG >> 3), chunks, length=length)
    return b"".join(draw(st.lists(event, max_size=2)) + draw(st.lists(strange, max_size=1)))


@st.composite
def damaged_events(draw: st.DrawFn) -> bytes:
    """Return good chunks of which some bytes are others, are gone, or are too many."""
    chunks = [Chunk(t, at, memoryview(d)) for t, at, d in draw(PLAINS)]
    data = bytearray(REQUESTS.encode(chunks))
    at = st.integers(0, len(data) - 1)
    for place, byte in draw(st.lists(st.tuples(at, st.integers(0, 255)), max_size=3)):
        data[place] = byte
    if draw(st.booleans()):
        del data[draw(at) :]
    return bytes(data) + draw(st.binary(max_size=3))


HUGE = varint(2**64 - 1)
CHUNK = b"\x08\x01\x10\x02\x1a\x03abc"
FORMS: dict[str, bytes] = {
    "nothing": b"",
    "tag-alone": bytes([CHUNKS_TAG]),
    "no-chunk": bytes([CHUNKS_TAG, 0]),
    "an-empty-chunk": field(3, field(1, b"")),
    "canonical": field(3, field(1, CHUNK)),
    "data-first": field(3, field(1, b"\x1a\x03abc\x08\x01\x10\x02")),
    "offset-first": field(3, field(1, b"\x10\x02\x08\x01\x1a\x03abc")),
    "tensor-twice": field(3, field(1, b"\x08\x01\x08\x02\x1a\x03abc")),
    "data-twice": field(3, field(1, b"\x1a\x03abc\x1a\x03def")),
    "no-data": field(3, field(1, b"\x08\x01\x10\x02")),
    "data-without-bytes": field(3, field(1, b"\x08\x01\x1a\x00")),
    "numbers-of-zero": field(3, field(1, b"\x08\x00\x10\x00\x1a\x01a")),
    "chunks-twice": field(3, field(1, CHUNK)) + field(3, field(1, b"\x1a\x01d")),
    "then-another-event": field(3, field(1, CHUNK)) + field(4, b""),
    "after-another-event": field(4, b"") + field(3, field(1, CHUNK)),
    "unknown-in-a-chunk": field(3, field(1, CHUNK + field(9, 1))),
    "unknown-among-chunks": field(3, field(1, CHUNK) + field(9, b"a")),
    "unknown-in-the-event": field(3, field(1, CHUNK)) + field(99, b"a"),
    "tag-overlong": b"\x9a\x00" + field(3, field(1, CHUNK))[1:],
    "tensor-overlong": field(3, field(1, field(1, 5, length=10) + b"\x1a\x01a")),
    "tensor-of-33-bits": field(3, field(1, field(1, 2**32 + 1) + b"\x1a\x01a")),
    "offset-of-65-bits": field(3, field(1, field(2, 2**64 + 1) + b"\x1a\x01a")),
    "offset-endless": field(3, field(1, b"\x10" + b"\xff" * 11 + b"\x1a\x01a")),
    "length-overlong": field(3, field(1, field(3, b"abc", length=5), length=5), length=5),
    "length-far-overlong": field(3, field(1, field(3, b"abc", length=10)), length=6),
    "length-huge": bytes([CHUNKS_TAG]) + HUGE + field(1, CHUNK),
    "length-of-a-chunk-huge": field(3, b"\x0a" + HUGE + CHUNK),
    "length-of-data-huge": field(3, field(1, b"\x1a" + HUGE + b"abc")),
    "length-of-4-gibibytes": field(3, field(1, b"\x1a" + varint(2**32 + 3) + b"abc")),
    "length-negative": field(3, field(1, b"\x1a" + varint(2**31) + b"abc")),
    "data-past-its-chunk": field(3, field(1, b"\x1a\x04abc") + field(1, CHUNK)),
    "data-short-of-its-chunk": field(3, field(1, b"\x1a\x02abc") + field(1, CHUNK)),
    "chunk-past-its-event": field(3, b"\x0a\x0c" + CHUNK) + field(4, b""),
    "number-past-its-chunk": field(3, b"\x0a\x02\x08\x81" + field(1, CHUNK)),
    "cut-in-a-tag": field(3, field(1, b"\x08")),
    "group": field(3, field(1, CHUNK) + b"\x0b\x0c"),
}


@pytest.mark.parametrize("data", FORMS.values(), ids=FORMS)
def test_whatever_form_chunks_have_they_are_what_protobuf_makes_of_them(data: bytes) -> None:
    check_as_protobuf(REQUESTS, data)


@pytest.mark.parametrize("data", FORMS.values(), ids=FORMS)
def test_wherever_chunks_are_cut_off_they_are_what_protobuf_makes_of_them(data: bytes) -> None:
    for end in range(len(data)):
        check_as_protobuf(REQUESTS, data[:end])


@given(data=loose_events())
@example(data=FORMS["length-far-overlong"])
def test_loose_forms_are_what_protobuf_makes_of_them(data: bytes) -> None:
    check_as_protobuf(REQUESTS, data)


@given(data=damaged_events())
def test_damaged_bytes_are_what_protobuf_makes_of_them(data: bytes) -> None:
    check_as_protobuf(REQUESTS, data)


@given(data=st.binary(max_size=60) | st.binary(max_size=60).map(bytes([CHUNKS_TAG]).__add__))
def test_any_bytes_are_what_protobuf_makes_of_them(data: bytes) -> None:
    check_as_protobuf(REQUESTS, data)


CANONICAL: dict[str, Callable[[], bytes]] = {
    "one-chunk": lambda: field(3, field(1, CHUNK)),
    "a-message-full-of-the-smallest": lambda: field(3, field(1, b"\x08\x01\x1a\x01a") * 1000),
}


@pytest.mark.parametrize("data", [make() for make in CANONICAL.values()], ids=CANONICAL)
def test_the_canonical_form_takes_no_detour(data: bytes) -> None:
    """Else all of the above would hold of protobuf alone."""
    decoded = REQUESTS.decode(data)
    assert isinstance(decoded, list)
    assert all(chunk.data.obj is data for chunk in decoded)
