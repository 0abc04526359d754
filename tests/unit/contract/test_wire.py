"""Tensors to chunks and back, whatever their sizes and however the chunks are mixed."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optserve.codec import ChunkCodec
from optserve.limits import CHUNK_BYTES_MAX, MESSAGE_BYTES_MAX, MESSAGE_HEADROOM_BYTES
from optserve.v1.optimizer_service_pb2 import TrainRequest
from optserve.v1.tensor_pb2 import DataType, TensorHeader
from optserve.wire import (
    ITEM_BYTES,
    Assembly,
    Buffer,
    ByteCountError,
    Chunk,
    ChunkError,
    FramingError,
    byte_count,
    data_type_name,
    split,
)

TENSORS = st.lists(st.binary(max_size=40), max_size=8)


class Hesitant:
    """A source that never gives more than a few bytes at once."""

    def __init__(self, data: bytes, most: int) -> None:
        self.byte_count = len(data)
        self._view = memoryview(data)
        self._most = most

    def read(self, offset: int, limit: int) -> memoryview:
        return self._view[offset : offset + min(limit, self._most)]


def _sources(tensors: list[bytes]) -> list[Buffer]:
    return [Buffer(memoryview(tensor)) for tensor in tensors]


def _memory(tensors: list[bytes]) -> list[bytearray]:
    return [bytearray(len(tensor)) for tensor in tensors]


def _targets(memory: list[bytearray]) -> list[Buffer]:
    return [Buffer(memoryview(each)) for each in memory]


def _chunk(tensor: int = 0, offset: int = 0, data: bytes = b"") -> Chunk:
    return Chunk(tensor, offset, memoryview(data))


@given(tensors=TENSORS, chunk_bytes=st.integers(min_value=1, max_value=50))
def test_what_is_split_is_assembled_again(tensors: list[bytes], chunk_bytes: int) -> None:
    memory = _memory(tensors)
    assembly = Assembly(_targets(memory))
    messages = list(split(_sources(tensors), chunk_bytes))
    for message in messages:
        count = sum(len(chunk.data) for chunk in message)
        assert 0 < count <= chunk_bytes
        assert all(chunk.data for chunk in message)
        assert assembly.add(message) == count
    assembly.finish()
    assert memory == [bytearray(tensor) for tensor in tensors]
    total = sum(map(len, tensors))
    assert len(messages) == -(-total // chunk_bytes)  # Packed as tightly as can be.


@given(tensors=TENSORS, chunk_bytes=st.integers(1, 50), most=st.integers(1, 20))
def test_a_source_may_give_less_than_there_is_room_for(
    tensors: list[bytes], chunk_bytes: int, most: int
) -> None:
    memory = _memory(tensors)
    assembly = Assembly(_targets(memory))
    for message in split([Hesitant(tensor, most) for tensor in tensors], chunk_bytes):
        assert 0 < assembly.add(message) <= chunk_bytes
    assembly.finish()
    assert memory == [bytearray(tensor) for tensor in tensors]


def test_a_source_is_read_again_only_when_its_message_has_gone() -> None:
    """What it returned is valid until then: it may be memory that the source uses again."""

    class Recycling(Hesitant):
        memory = bytearray(4)

        def read(self, offset: int, limit: int) -> memoryview:
            data = super().read(offset, limit)
            self.memory[: len(data)] = data
            return memoryview(self.memory)[: len(data)]

    data = bytes(range(30))
    came = [
        b"".join(bytes(chunk.data) for chunk in message)
        for message in split([Recycling(data, 4)], 10)
    ]
    assert b"".join(came) == data


@given(tensors=TENSORS, seed=st.integers())
def test_chunks_of_different_tensors_may_interleave(tensors: list[bytes], seed: int) -> None:
    chunks = [chunk for message in split(_sources(tensors), 3) for chunk in message]
    order = random.Random(seed)
    queues = [[c for c in chunks if c.tensor == tensor] for tensor in range(len(tensors))]
    memory = _memory(tensors)
    assembly = Assembly(_targets(memory))
    while any(queues):
        queue = order.choice([queue for queue in queues if queue])
        assembly.add([queue.pop(0)])
    assembly.finish()
    assert memory == [bytearray(tensor) for tensor in tensors]


@given(
    tensors=TENSORS,
    chunks=st.lists(
        st.builds(
            _chunk,
            tensor=st.integers(0, 9),
            offset=st.integers(0, 41) | st.integers(0, 2**64 - 1),
            data=st.binary(max_size=5),
        )
    ),
)
def test_whatever_comes_is_written_where_it_belongs_or_refused(
    tensors: list[bytes], chunks: list[Chunk]
) -> None:
    memory = _memory(tensors)
    assembly = Assembly(_targets(memory))
    received = [0] * len(tensors)
    for chunk in chunks:
        fits = (
            chunk.tensor < len(tensors)
            and chunk.data
            and chunk.offset == received[chunk.tensor]
            and chunk.offset + len(chunk.data) <= len(tensors[chunk.tensor])
        )
        before = [bytes(each) for each in memory]
        if fits:
            assert assembly.add([chunk]) == len(chunk.data)
            received[chunk.tensor] += len(chunk.data)
            continue
        with pytest.raises(FramingError) as caught:
            assembly.add([chunk])
        assert caught.value.tensor == chunk.tensor
        assert [bytes(each) for each in memory] == before
    if [len(tensor) for tensor in tensors] == received:
        assembly.finish()
    else:
        with pytest.raises(ByteCountError):
            assembly.finish()


@pytest.mark.parametrize(
    ("chunk", "error", "expected"),
    [
        pytest.param(_chunk(tensor=2, data=b"a"), ChunkError, "below 2", id="no-such-tensor"),
        pytest.param(_chunk(offset=1, data=b"a"), ChunkError, "offset 0", id="gap"),
        pytest.param(_chunk(tensor=1, data=b"a"), ChunkError, "offset 2", id="overlap"),
        pytest.param(_chunk(tensor=1, offset=2), ChunkError, "offset 2", id="empty"),
        pytest.param(_chunk(data=b"abcde"), ByteCountError, "4 bytes", id="past-the-end"),
        pytest.param(_chunk(offset=2**64 - 1, data=b"ab"), ChunkError, "offset 0", id="overflow"),
    ],
)
def test_a_chunk_that_does_not_fit_is_refused_with_what_would_have(
    chunk: Chunk, error: type[FramingError], expected: str
) -> None:
    assembly = Assembly(_targets([bytearray(4), bytearray(4)]))
    assembly.add([_chunk(tensor=1, data=b"ab")])
    with pytest.raises(error) as caught:
        assembly.add([chunk])
    assert caught.value.expected == expected


def test_nothing_at_all_is_complete() -> None:
    assert list(split([])) == []
    assert list(split(_sources([b"", b""]))) == []
    Assembly([]).finish()
    Assembly(_targets([bytearray()])).finish()


def test_every_data_type_has_a_size_and_a_name() -> None:
    assert set(ITEM_BYTES) == set(DataType.values()) - {DataType.DATA_TYPE_UNSPECIFIED}
    assert data_type_name(DataType.DATA_TYPE_BF16) == "BF16"
    header = TensorHeader(data_type=DataType.DATA_TYPE_FP64, shape=[2**40, 3, 2**40])
    assert byte_count(header) == 3 * 2**83
    assert byte_count(TensorHeader(data_type=DataType.DATA_TYPE_INT16)) == 2


def test_a_full_message_of_the_smallest_chunks_fits_into_a_message() -> None:
    """The worst packing of 10,000 parameters' bytes stays below gRPC's default limit."""
    tensors = [bytes(CHUNK_BYTES_MAX // 10_000)] * 10_000
    (chunks,) = split(_sources(tensors))
    assert len(chunks) == 10_000
    message = ChunkCodec(TrainRequest).encode(chunks)
    assert len(message) < MESSAGE_BYTES_MAX - MESSAGE_HEADROOM_BYTES
