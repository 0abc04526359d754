"""Tensors to chunks and back, whatever their sizes and however the chunks are mixed."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optserve.limits import CHUNK_BYTES_MAX, MESSAGE_BYTES_MAX, MESSAGE_HEADROOM_BYTES
from optserve.v1.tensor_pb2 import DataType, TensorChunk, TensorChunks, TensorHeader
from optserve.wire import (
    ITEM_BYTES,
    Assembly,
    ByteCountError,
    ChunkError,
    FramingError,
    byte_count,
    data_type_name,
    split,
)

TENSORS = st.lists(st.binary(max_size=40), max_size=8)


def _views(tensors: list[bytes]) -> list[memoryview]:
    return [memoryview(tensor) for tensor in tensors]


def _targets(tensors: list[bytes]) -> list[bytearray]:
    return [bytearray(len(tensor)) for tensor in tensors]


@given(tensors=TENSORS, chunk_bytes=st.integers(min_value=1, max_value=50))
def test_what_is_split_is_assembled_again(tensors: list[bytes], chunk_bytes: int) -> None:
    targets = _targets(tensors)
    assembly = Assembly([memoryview(target) for target in targets])
    messages = list(split(_views(tensors), chunk_bytes))
    for message in messages:
        count = sum(len(chunk.data) for chunk in message.chunks)
        assert 0 < count <= chunk_bytes
        assert all(chunk.data for chunk in message.chunks)
        assert assembly.add(message.chunks) == count
    assembly.finish()
    assert targets == [bytearray(tensor) for tensor in tensors]
    total = sum(map(len, tensors))
    assert len(messages) == -(-total // chunk_bytes)  # Packed as tightly as can be.


@given(tensors=TENSORS, seed=st.integers())
def test_chunks_of_different_tensors_may_interleave(tensors: list[bytes], seed: int) -> None:
    chunks = [chunk for message in split(_views(tensors), 3) for chunk in message.chunks]
    order = random.Random(seed)
    queues = [[c for c in chunks if c.tensor == tensor] for tensor in range(len(tensors))]
    targets = _targets(tensors)
    assembly = Assembly([memoryview(target) for target in targets])
    while any(queues):
        queue = order.choice([queue for queue in queues if queue])
        assembly.add([queue.pop(0)])
    assembly.finish()
    assert targets == [bytearray(tensor) for tensor in tensors]


@given(
    tensors=TENSORS,
    chunks=st.lists(
        st.builds(
            TensorChunk,
            tensor=st.integers(0, 9),
            offset=st.integers(0, 41) | st.integers(0, 2**64 - 1),
            data=st.binary(max_size=5),
        )
    ),
)
def test_whatever_comes_is_written_where_it_belongs_or_refused(
    tensors: list[bytes], chunks: list[TensorChunk]
) -> None:
    targets = _targets(tensors)
    assembly = Assembly([memoryview(target) for target in targets])
    received = [0] * len(tensors)
    for chunk in chunks:
        fits = (
            chunk.tensor < len(tensors)
            and chunk.data
            and chunk.offset == received[chunk.tensor]
            and chunk.offset + len(chunk.data) <= len(tensors[chunk.tensor])
        )
        before = [bytes(target) for target in targets]
        if fits:
            assert assembly.add([chunk]) == len(chunk.data)
            received[chunk.tensor] += len(chunk.data)
            continue
        with pytest.raises(FramingError) as caught:
            assembly.add([chunk])
        assert caught.value.tensor == chunk.tensor
        assert [bytes(target) for target in targets] == before
    if [len(tensor) for tensor in tensors] == received:
        assembly.finish()
    else:
        with pytest.raises(ByteCountError):
            assembly.finish()


@pytest.mark.parametrize(
    ("chunk", "error", "expected"),
    [
        pytest.param(TensorChunk(tensor=2, data=b"a"), ChunkError, "below 2", id="no-such-tensor"),
        pytest.param(TensorChunk(offset=1, data=b"a"), ChunkError, "offset 0", id="gap"),
        pytest.param(TensorChunk(tensor=1, data=b"a"), ChunkError, "offset 2", id="overlap"),
        pytest.param(TensorChunk(tensor=1, offset=2), ChunkError, "offset 2", id="empty"),
        pytest.param(TensorChunk(data=b"abcde"), ByteCountError, "4 bytes", id="past-the-end"),
        pytest.param(
            TensorChunk(offset=2**64 - 1, data=b"ab"), ChunkError, "offset 0", id="overflow"
        ),
    ],
)
def test_a_chunk_that_does_not_fit_is_refused_with_what_would_have(
    chunk: TensorChunk, error: type[FramingError], expected: str
) -> None:
    assembly = Assembly([memoryview(bytearray(4)), memoryview(bytearray(4))])
    assembly.add([TensorChunk(tensor=1, data=b"ab")])
    with pytest.raises(error) as caught:
        assembly.add([chunk])
    assert caught.value.expected == expected


def test_nothing_at_all_is_complete() -> None:
    assert list(split([])) == []
    assert list(split([memoryview(b""), memoryview(b"")])) == []
    Assembly([]).finish()
    Assembly([memoryview(bytearray())]).finish()


def test_every_data_type_has_a_size_and_a_name() -> None:
    assert set(ITEM_BYTES) == set(DataType.values()) - {DataType.DATA_TYPE_UNSPECIFIED}
    assert data_type_name(DataType.DATA_TYPE_BF16) == "BF16"
    header = TensorHeader(data_type=DataType.DATA_TYPE_FP64, shape=[2**40, 3, 2**40])
    assert byte_count(header) == 3 * 2**83
    assert byte_count(TensorHeader(data_type=DataType.DATA_TYPE_INT16)) == 2


def test_a_full_message_of_the_smallest_chunks_fits_into_a_message() -> None:
    """The worst packing of 10,000 parameters' bytes stays below gRPC's default limit."""
    tensors = [bytes(CHUNK_BYTES_MAX // 10_000)] * 10_000
    (message,) = split(_views(tensors))
    assert message.ByteSize() < MESSAGE_BYTES_MAX - MESSAGE_HEADROOM_BYTES
    assert isinstance(message, TensorChunks)
