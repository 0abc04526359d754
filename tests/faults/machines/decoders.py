"""Everything that makes sense of strange bytes, each with examples of what it takes.

A decoder takes bytes, or refuses them by the errors that it declares; whatever else it does is a
fault. Where the same can be decoded in two ways, they must agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from faults.machines.stored import STORED
from faults.machines.valid import SERVICE, requests
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from torch import Tensor

from optserve.codec import ChunkCodec, codec_of, unwrapped
from optserve.encodings import DecodingTarget
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.tensor_pb2 import Encoding, TensorChunk, TensorChunks
from optserve.wire import Assembly, Buffer, Chunk, FramingError
from optserve_server.core.encodings import CODECS
from optserve_server.core.errors import OptserveError
from optserve_server.core.expression import Expression
from optserve_server.core.limits import Limits
from optserve_server.rpc import decode, decode_spec
from optserve_server.rpc.constraints import check_known
from optserve_server.rpc.encoded import ENCODINGS

_LIMITS = Limits()
_METHODS = sorted(SERVICE.methods_by_name)
_ELEMENTS_MAX = 600  # Two blocks of INT8_BLOCKS, and a part of a third.
_EXPRESSIONS = (
    "0.95 ** epoch",
    "(epoch + 1) / 10 if epoch < 10 else 0.5 * (1 + cos(pi * min(epoch, 50) / 50))",
    "1 / (1 + 0.1 * epoch)",
    "9 ** 9 ** 9",
    "max(abs(-epoch), sqrt(2), exp(1), log(3), floor(2.5), ceil(1.2), sin(e)) % 7 // 2",
    "not epoch and 1 or 2",
    "().__class__",
    "[epoch for epoch in 'a']",
)
_COUNTS = (0, 1, 10**9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """One of them."""

    examples: Sequence[bytes]
    """What it takes."""
    take: Callable[[bytes], None]
    """Decodes bytes; raises only at a fault."""


class DisagreementError(Exception):
    """Two ways to decode the same do not agree."""


def _take_request(data: bytes) -> None:
    """Decode a request as the server does; the first byte chooses the method."""
    if not data:
        return
    method = SERVICE.methods_by_name[_METHODS[data[0] % len(_METHODS)]]
    codec = codec_of(method.input_type)
    parse = codec.parse if codec else GetMessageClass(method.input_type).FromString
    with suppress(DecodeError, OptserveError):
        request = parse(data[1:])
        if not isinstance(request, list):
            check_known(request)
            _decode(unwrapped(request) if codec else request)


def _decode(request: object) -> None:
    """Decode as much of a request as can be without a session."""
    match request:
        case pb.CreateSessionRequest():
            spec = decode_spec.session_spec(request.spec, _LIMITS)
            decode_spec.values(request.values, spec, _LIMITS)
        case pb.UpdateSessionRequest():
            decode.non_finite(request.non_finite, "non_finite")
            decode_spec.choice(request.loss, "loss", _LIMITS)
        case pb.ListSessionsRequest() | pb.ListLossPointsRequest():
            decode.page(request.page_size, request.page_token, 100)
        case pb.UploadParametersRequest():
            decode.tensor_specs(request.begin.parameters, _LIMITS, "parameters")
        case pb.TrainRequest():
            decode.tensor_specs(request.begin.gradients, _LIMITS, "gradients")
            decode.positions(request.shared.absent, 2, "absent")
        case pb.StepRequest():
            headers = [each.header for each in request.gradients]
            decode.tensor_specs(headers, _LIMITS, "gradients")
        case pb.EvaluateLossRequest():
            decode.split(request.split)
            decode.tensor(request.predictions, _LIMITS, "predictions")
            decode.tensor(request.targets, _LIMITS, "targets")


def _take_chunks(data: bytes) -> None:
    """Decode an event by hand, and by protobuf."""
    try:
        expected = unwrapped(pb.TrainRequest.FromString(data))
    except DecodeError:
        expected = None
    try:
        came = ChunkCodec(pb.TrainRequest).decode(data)
    except DecodeError:
        came = None
    if _comparable(came) != _comparable(expected):
        raise DisagreementError(f"{data.hex()}: {came!r} and {expected!r}")


def _comparable(event: object) -> object:
    if not isinstance(event, list):
        return event
    return [(chunk.tensor, chunk.offset, bytes(chunk.data)) for chunk in event]


def _take_frames(data: bytes) -> None:
    """Fill three small tensors with whatever chunks there are."""
    memories = [bytearray(count) for count in (12, 0, 5)]
    assembly = Assembly([Buffer(memoryview(memory)) for memory in memories])
    with suppress(DecodeError, FramingError):
        event = ChunkCodec(pb.TrainRequest).decode(data)
        if isinstance(event, list):
            assembly.add(event)
            assembly.finish()
    if [len(memory) for memory in memories] != [12, 0, 5]:
        raise DisagreementError("a tensor has another size now")


def _take_encoded(data: bytes) -> None:
    """Decode elements at once, and in two pieces; the first three bytes say how."""
    if len(data) < 3:
        return
    encoding = list(CODECS)[data[0] % len(CODECS)]
    count = 1 + (data[1] * 3 + data[2]) % _ELEMENTS_MAX
    whole, pieces = torch.zeros(count), torch.zeros(count)
    target = DecodingTarget(ENCODINGS[encoding], count, _decoder_into(ENCODINGS[encoding], whole))
    body = (data[3:] * (target.byte_count // max(1, len(data) - 3) + 1))[: target.byte_count]
    if len(body) < target.byte_count:
        return
    target.write(0, memoryview(body))
    target = DecodingTarget(ENCODINGS[encoding], count, _decoder_into(ENCODINGS[encoding], pieces))
    cut = 1 + data[2] % len(body)
    for offset, piece in ((0, body[:cut]), (cut, body[cut:])):
        if piece:
            target.write(offset, memoryview(piece))
    # Which of the many NaNs one becomes differs between torch's vector units and its scalar code.
    for values in (whole, pieces):
        values.view(torch.int32)[values.isnan()] = 0x7FC00000
    if whole.view(torch.int32).tolist() != pieces.view(torch.int32).tolist():
        raise DisagreementError(f"{encoding}: {count} elements, cut at {cut}")


def _decoder_into(
    encoding: Encoding.ValueType, values: Tensor
) -> Callable[[int, int, memoryview], None]:
    codec = next(codec for name, codec in CODECS.items() if ENCODINGS[name] == encoding)

    def decode_piece(first: int, last: int, data: memoryview) -> None:
        codec.decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), values[first:last])

    return decode_piece


def _take_expression(data: bytes) -> None:
    """Compile an expression, and compute what it says."""
    text = data.decode(errors="replace")
    with suppress(OptserveError):
        expression = Expression(
            text,
            chars_max=_LIMITS.expression_chars_max,
            nodes_max=_LIMITS.expression_nodes_max,
            field="lr_lambda",
        )
        for count in _COUNTS:
            value = expression(count)
            if not (math.isfinite(value) and value >= 0):
                raise DisagreementError(f"{text!r} is {value} for {count}")


def _request_examples() -> list[bytes]:
    return [
        bytes([_METHODS.index(name)]) + request.SerializeToString()
        for name, examples in requests("0" * 32).items()
        for request in examples
    ]


def _chunk_examples() -> list[bytes]:
    chunks = [Chunk(0, 0, memoryview(b"abcdefghijkl")), Chunk(2, 0, memoryview(b"mnopq"))]
    by_hand = ChunkCodec(pb.TrainRequest).encode(chunks)
    high = TensorChunk(tensor=2**32 - 1, offset=2**64 - 1, data=b"a")
    return [
        by_hand,
        pb.TrainRequest(chunks=TensorChunks(chunks=[high])).SerializeToString(),
        pb.TrainRequest(chunks=TensorChunks()).SerializeToString(),
        pb.TrainRequest(end=pb.StepEnd()).SerializeToString(),
    ]


DECODERS: Mapping[str, Decoder] = {
    "requests": Decoder(examples=_request_examples(), take=_take_request),
    "chunks": Decoder(examples=_chunk_examples(), take=_take_chunks),
    "frames": Decoder(examples=_chunk_examples(), take=_take_frames),
    "encodings": Decoder(
        examples=[bytes([kind, 85, 2]) + bytes(range(64)) for kind in range(len(CODECS))],
        take=_take_encoded,
    ),
    "expressions": Decoder(
        examples=[text.encode() for text in _EXPRESSIONS], take=_take_expression
    ),
    **{name: Decoder(examples=examples, take=take) for name, (examples, take) in STORED.items()},
}
