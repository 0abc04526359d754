"""The tensors of a step as the session's encodings have them: gradients in, parameters out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optserve import encodings, wire
from optserve.encodings import DecodingTarget, EncodingSource, encoded_bytes
from optserve.v1 import tensor_pb2
from optserve_server.core.encodings import CODECS, encode_differences
from optserve_server.core.spec import Encoding
from optserve_server.core.tensors import TensorSpec, byte_view
from optserve_server.rpc.transfer import Views

ENCODINGS: dict[Encoding, tensor_pb2.Encoding.ValueType] = {
    Encoding.PLAIN: tensor_pb2.ENCODING_UNSPECIFIED,
    Encoding.BF16: tensor_pb2.ENCODING_BF16,
    Encoding.FP16: tensor_pb2.ENCODING_FP16,
    Encoding.INT8_BLOCKS: tensor_pb2.ENCODING_INT8_BLOCKS,
}
"""The contract's number of each encoding."""

_HALVES = (Encoding.BF16, Encoding.FP16)


def byte_count(spec: TensorSpec, encoding: Encoding) -> int:
    """Return how many bytes a tensor has on the wire; exact for any shape."""
    if encoding is Encoding.PLAIN:
        return spec.byte_count
    return encoded_bytes(ENCODINGS[encoding], spec.element_count)


def complete_elements(spec: TensorSpec, encoding: Encoding, count: int) -> int:
    """Return how many elements of a tensor its first ``count`` bytes hold in full."""
    if encoding is Encoding.PLAIN:
        return count // spec.dtype.itemsize
    return encodings.complete_elements(ENCODINGS[encoding], count, spec.element_count)


class GradientTargets:
    """Where a worker's gradients go."""

    def __init__(self, encoding: Encoding) -> None:
        """Decode what comes in ``encoding``."""
        self._encoding = encoding
        self._views = Views()

    def of(self, tensors: Sequence[Tensor]) -> Sequence[wire.Target]:
        """Return what fills each of the tensors, once: contiguous, on the CPU."""
        if self._encoding is Encoding.PLAIN:
            return self._views.of(tensors)
        return [_decoding_target(self._encoding, tensor) for tensor in tensors]


class ParameterSources:
    """Where the parameters of the answers to a worker come from, one answer after the other.

    INT8 of parameters would be too coarse: a step moves them by less than what is rounded away. So
    the worker gets the differences to what it has, and each makes good what the one before has
    rounded away. What it has is kept here, in memory that was reserved with the session.
    """

    def __init__(self, encoding: Encoding) -> None:
        """Encode in ``encoding``."""
        self._wanted = encoding
        self._views = Views()
        self._reference: list[Tensor] = []
        self._holds = False  # Whether the worker has what the reference says.
        self._differs = False  # Whether the answer that was begun last holds differences.
        self._finite = True
        self.encoding = tensor_pb2.ENCODING_UNSPECIFIED
        """Of the answer that was begun last."""

    def of(self, parameters: Sequence[Tensor]) -> Sequence[wire.Source]:
        """Begin an answer, and return its sources, to be read once, from the front.

        Args:
            parameters: Contiguous, on the CPU; held still by the caller.
        """
        self.begin(parameters)
        return self.whole(parameters)

    def whole(self, parameters: Sequence[Tensor]) -> Sequence[wire.Source]:
        """Return the sources of the answer that was begun; see of()."""
        if self._wanted is Encoding.PLAIN:
            return self._views.of(parameters)
        return [self._source(i, 0, each.view(-1)) for i, each in enumerate(parameters)]

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Begin an answer whose parts come one by one."""
        self.encoding = ENCODINGS[self._wanted]
        if self._wanted is Encoding.INT8_BLOCKS:
            self._differs, self._holds, self._finite = self._holds, False, True
            self.encoding = ENCODINGS[Encoding.INT8_BLOCKS if self._differs else Encoding.PLAIN]
            if not self._reference:
                self._reference = [torch.empty_like(each) for each in parameters]

    def part(self, position: int, first: int, values: Tensor) -> wire.Part:
        """Return some elements of a parameter as a part of the answer that was begun.

        Args:
            position: Of the parameter.
            first: Number of the first element; where blocks of an encoding begin.
            values: Flat, on the CPU. The parts of a parameter come, and are read, in order.
        """
        return wire.Part(
            position, self._offset(first, values), self._source(position, first, values)
        )

    def part_now(self, position: int, first: int, values: Tensor) -> wire.Part:
        """Return a part, see part(); for any thread.

        Halves are converted at once. What depends on the answer before is, when it is read.
        """
        if self._wanted not in _HALVES:
            return self.part(position, first, values)
        data = torch.empty(encoded_bytes(self.encoding, values.numel()), dtype=torch.uint8)
        CODECS[self._wanted].encode(values, data)
        return wire.Part(position, self._offset(first, values), wire.Buffer(byte_view(data)))

    def _offset(self, first: int, values: Tensor) -> int:
        plain = self.encoding == tensor_pb2.ENCODING_UNSPECIFIED
        return first * values.itemsize if plain else encoded_bytes(self.encoding, first)

    def _source(self, position: int, first: int, values: Tensor) -> wire.Source:
        if self._wanted is Encoding.PLAIN:
            return wire.Buffer(byte_view(values))
        if self._wanted is not Encoding.INT8_BLOCKS:
            return encoding_source(self._wanted, values)
        reference = self._reference[position].view(-1)[first : first + values.numel()]
        return (self._difference_source if self._differs else _KeptSource)(values, reference)

    def delivered(self) -> None:
        """Note that the answer has been written to its end, so that the next one builds on it."""
        self._holds = self._finite

    def _difference_source(self, values: Tensor, reference: Tensor) -> EncodingSource:
        def encode(first: int, last: int, data: memoryview) -> None:
            finite = encode_differences(values[first:last], reference[first:last], _bytes(data))
            self._finite = self._finite and finite

        return EncodingSource(tensor_pb2.ENCODING_INT8_BLOCKS, values.numel(), encode)


class _KeptSource:
    """A tensor that is sent as it is, and copied to where it is kept: a wire.Source."""

    def __init__(self, values: Tensor, kept: Tensor) -> None:
        self._values = byte_view(values)
        self._kept = byte_view(kept)
        self.byte_count = len(self._values)

    def read(self, offset: int, limit: int) -> memoryview:
        """Return a view of the tensor's memory, and copy it."""
        data = self._values[offset : offset + limit]
        self._kept[offset : offset + len(data)] = data  # copy: parameter to reference.
        return data


def encoding_source(encoding: Encoding, tensor: Tensor) -> EncodingSource:
    """Return a source of a tensor's elements: contiguous, on the CPU, held still."""
    codec, values = CODECS[encoding], tensor.view(-1)

    def encode(first: int, last: int, data: memoryview) -> None:
        codec.encode(values[first:last], _bytes(data))

    return EncodingSource(ENCODINGS[encoding], values.numel(), encode)


def _decoding_target(encoding: Encoding, tensor: Tensor) -> DecodingTarget:
    codec, values = CODECS[encoding], tensor.view(-1)

    def decode(first: int, last: int, data: memoryview) -> None:
        # copy: message to memory that torch may have, and where numbers are aligned; in cache.
        codec.decode(_bytes(bytearray(data)), values[first:last])

    return DecodingTarget(ENCODINGS[encoding], values.numel(), decode)


def _bytes(data: memoryview | bytearray) -> Tensor:
    """Return a tensor over writable memory."""
    return torch.frombuffer(data, dtype=torch.uint8)
