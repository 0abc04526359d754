"""Events of a stream to bytes and back; those that are full of tensor data without detours.

protobuf's Python would copy a chunk's data four times on its way in: into the parsed message, out
of it, and so on. Here a chunk is a view of the bytes that gRPC has handed over, and is copied once,
to where it belongs. Everything but the canonical form of a `chunks` event is left to protobuf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from optserve.v1.tensor_pb2 import TensorChunks
from optserve.wire import Chunk

EventT = TypeVar("EventT", bound=Message)

# Tags of TensorChunks and TensorChunk: the field's number times 8, and its wire type, which is 2
# for what has a length, and 0 for a varint.
_CHUNK_TAG = 1 << 3 | 2
_TENSOR_TAG = 1 << 3
_OFFSET_TAG = 2 << 3
_DATA_TAG = 3 << 3 | 2
_VARINT_BYTES_MAX = 10


def codec_of(message: Descriptor) -> ChunkCodec[Any] | None:
    """Return the codec of the events of a stream that carries tensors; None for other messages."""
    return ChunkCodec(GetMessageClass(message)) if "chunks" in message.fields_by_name else None


class ChunkCodec(Generic[EventT]):
    """Encodes and decodes the events of one stream: messages, or lists of chunks."""

    def __init__(self, event: type[EventT]) -> None:
        """Encode and decode ``event``, one of whose fields is ``chunks``, of TensorChunks."""
        self._parse = event.FromString
        self._tag = event.DESCRIPTOR.fields_by_name["chunks"].number << 3 | 2

    def decode(self, data: bytes) -> EventT | list[Chunk]:
        """Return the event: a list if it is chunks, which are views of ``data``.

        Raises:
            google.protobuf.message.DecodeError: It is no event at all.
        """
        event = self.parse(data)
        return event if isinstance(event, list) else unwrapped(event)

    def parse(self, data: bytes) -> EventT | list[Chunk]:
        """Return the event as ``decode`` does, but chunks in a form of their own as a message.

        With fields in another order, say; or with fields that we do not know.

        Raises:
            google.protobuf.message.DecodeError: It is no event at all.
        """
        if data and data[0] == self._tag:
            chunks = _parse_chunks(data)
            if chunks is not None:
                return chunks
        return self._parse(data)

    def encode(self, event: EventT | Sequence[Chunk]) -> bytes:
        """Return the event's bytes. Chunks' data is copied, once."""
        if isinstance(event, Message):
            return event.SerializeToString()
        parts: list[bytes | memoryview] = [b""]
        total = 0
        for tensor, offset, data in event:
            head = _TENSOR_BYTES[tensor] if tensor < len(_TENSOR_BYTES) else _tensor_field(tensor)
            if offset:
                head += b"\x10" + _varint(offset)
            head += b"\x1a" + _varint(len(data))
            head = b"\x0a" + _varint(len(head) + len(data)) + head
            parts += (head, data)
            total += len(head) + len(data)
        parts[0] = bytes((self._tag,)) + _varint(total)
        return b"".join(parts)  # copy: tensors to message; gRPC copies it once more.


def unwrapped(event: EventT) -> EventT | list[Chunk]:
    """Return the chunks of an event that holds some, and any other event as it is."""
    if event.WhichOneof("event") != "chunks":
        return event
    message: TensorChunks = event.chunks  # type: ignore[attr-defined] # it has: see ChunkCodec
    return [Chunk(each.tensor, each.offset, memoryview(each.data)) for each in message.chunks]


def _parse_chunks(data: bytes) -> list[Chunk] | None:
    """Return the chunks of an event, if it is nothing else and in canonical form."""
    view, end = memoryview(data), len(data)
    size, at = _read_varint(data, 1)
    if at + size != end:
        return None
    chunks: list[Chunk] = []
    while at < end:
        if data[at] != _CHUNK_TAG:
            return None
        size, at = _read_varint(data, at + 1)
        chunk_end = at + size
        tensor = offset = 0
        if chunk_end > end or at == chunk_end:
            return None
        if data[at] == _TENSOR_TAG:
            tensor, at = _read_varint(data, at + 1)
        if at < chunk_end and data[at] == _OFFSET_TAG:
            offset, at = _read_varint(data, at + 1)
        if at >= chunk_end or data[at] != _DATA_TAG:
            return None
        size, at = _read_varint(data, at + 1)
        if at + size != chunk_end or tensor >> 32 or offset >> 64:
            return None
        chunks.append(Chunk(tensor, offset, view[at:chunk_end]))
        at = chunk_end
    return chunks


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at a position, and the position after it.

    One that has no end, or is longer than it need be, comes out as one that fits nowhere: protobuf
    knows better than we how long it may be.
    """
    end = len(data)
    if at < end and data[at] < 0x80:
        return data[at], at + 1
    value = 0
    for shift in range(0, 7 * _VARINT_BYTES_MAX, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value, at) if byte else (end + 1, end)
    return end + 1, end


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _tensor_field(tensor: int) -> bytes:
    return b"\x08" + _varint(tensor) if tensor else b""


_TENSOR_BYTES = [_tensor_field(tensor) for tensor in range(256)]
