"""torch's tensors as the contract's messages, and back: the tests' own, beside the server's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from optserve.limits import CHUNK_BYTES_MAX
from optserve.v1 import tensor_pb2
from optserve.v1.tensor_pb2 import DataType, TensorChunk, TensorChunks, TensorHeader

DATA_TYPES = {
    torch.bool: DataType.DATA_TYPE_BOOL,
    torch.uint8: DataType.DATA_TYPE_UINT8,
    torch.int8: DataType.DATA_TYPE_INT8,
    torch.int16: DataType.DATA_TYPE_INT16,
    torch.int32: DataType.DATA_TYPE_INT32,
    torch.int64: DataType.DATA_TYPE_INT64,
    torch.float16: DataType.DATA_TYPE_FP16,
    torch.float32: DataType.DATA_TYPE_FP32,
    torch.float64: DataType.DATA_TYPE_FP64,
    torch.bfloat16: DataType.DATA_TYPE_BF16,
}
DTYPES = {data_type: dtype for dtype, data_type in DATA_TYPES.items()}


def header_of(name: str, tensor: Tensor) -> TensorHeader:
    """Return what announces a tensor."""
    return TensorHeader(name=name, data_type=DATA_TYPES[tensor.dtype], shape=tensor.shape)


def headers_of(tensors: Mapping[str, Tensor]) -> list[TensorHeader]:
    """Return what announces tensors, in their order."""
    return [header_of(name, tensor) for name, tensor in tensors.items()]


def bytes_of(tensor: Tensor) -> bytes:
    """Return the elements' bytes, row-major."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def message_of(tensor: Tensor, name: str = "") -> tensor_pb2.Tensor:
    """Return a whole tensor as a message."""
    return tensor_pb2.Tensor(header=header_of(name, tensor), data=bytes_of(tensor))


def messages_of(tensors: Mapping[str, Tensor]) -> list[tensor_pb2.Tensor]:
    """Return whole tensors as messages, in their order."""
    return [message_of(tensor, name) for name, tensor in tensors.items()]


def chunks_of(
    tensors: Iterable[Tensor], chunk_bytes: int = CHUNK_BYTES_MAX
) -> Iterator[TensorChunks]:
    """Yield the tensors' bytes as messages of at most ``chunk_bytes``, small tensors together."""
    packed, room = TensorChunks(), chunk_bytes
    for position, tensor in enumerate(tensors):
        data, offset = bytes_of(tensor), 0
        while offset < len(data):
            piece = data[offset : offset + room]
            packed.chunks.append(TensorChunk(tensor=position, offset=offset, data=piece))
            offset, room = offset + len(piece), room - len(piece)
            if room == 0:
                yield packed
                packed, room = TensorChunks(), chunk_bytes
    if packed.chunks:
        yield packed


def tensor_of(message: tensor_pb2.Tensor) -> Tensor:
    """Return the tensor that a message holds."""
    return _decoded(message.header, bytearray(message.data))


def tensors_of(messages: Iterable[tensor_pb2.Tensor]) -> dict[str, Tensor]:
    """Return the tensors that messages hold, by name."""
    return {message.header.name: tensor_of(message) for message in messages}


def assembled(
    headers: Iterable[TensorHeader], messages: Iterable[TensorChunks]
) -> dict[str, Tensor]:
    """Return the announced tensors, made from all the chunks that follow."""
    announced = list(headers)
    received = [bytearray() for _ in announced]
    for message in messages:
        for chunk in message.chunks:
            assert chunk.offset == len(received[chunk.tensor])
            received[chunk.tensor] += chunk.data
    return {
        header.name: _decoded(header, data)
        for header, data in zip(announced, received, strict=True)
    }


def _decoded(header: TensorHeader, data: bytearray) -> Tensor:
    dtype = DTYPES[header.data_type]
    if not data:
        return torch.empty(tuple(header.shape), dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(tuple(header.shape))
