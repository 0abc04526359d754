"""What goes wrong with tensors on their way, wherever they go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from faults.ground import Ground
from messages import bytes_of, header_of
from scenarios.models import model

from optserve.limits import CHUNK_BYTES_MAX
from optserve.v1.tensor_pb2 import DataType, TensorChunk, TensorChunks, TensorHeader

W, B = header_of("w", model()["w"]), header_of("b", model()["b"])
W_BYTES, B_BYTES = bytes_of(model()["w"]), bytes_of(model()["b"])
HUGE = TensorHeader(name="w", data_type=DataType.DATA_TYPE_FP32, shape=[2_500_000_000_000])


def chunks_at(*chunks: tuple[int, int, bytes]) -> TensorChunks:
    return TensorChunks(
        chunks=[TensorChunk(tensor=tensor, offset=at, data=data) for tensor, at, data in chunks]
    )


FRAMING: dict[str, tuple[list[TensorChunks], str, str]] = {
    "tensor-not-announced": ([chunks_at((2, 0, b"a"))], "CHUNK_OUT_OF_ORDER", "[2]"),
    "tensor-absurd": ([chunks_at((2**32 - 1, 0, b"a"))], "CHUNK_OUT_OF_ORDER", f"[{2**32 - 1}]"),
    "gap": ([chunks_at((0, 4, W_BYTES[4:]))], "CHUNK_OUT_OF_ORDER", "[0]"),
    "overlap": (
        [chunks_at((0, 0, W_BYTES[:8]), (0, 4, W_BYTES[4:]))],
        "CHUNK_OUT_OF_ORDER",
        "[0]",
    ),
    "chunk-twice": (
        [chunks_at((1, 0, B_BYTES)), chunks_at((1, 0, B_BYTES))],
        "CHUNK_OUT_OF_ORDER",
        "[1]",
    ),
    "offset-absurd": ([chunks_at((0, 2**64 - 1, b"abcd"))], "CHUNK_OUT_OF_ORDER", "[0]"),
    "chunk-empty": ([chunks_at((0, 0, b""))], "CHUNK_OUT_OF_ORDER", "[0]"),
    "message-empty": ([TensorChunks()], "CHUNK_OUT_OF_ORDER", "chunks"),
    "bytes-too-many": ([chunks_at((0, 0, W_BYTES + b"a"))], "BYTE_COUNT_MISMATCH", "[0]"),
    "bytes-too-few": (
        [chunks_at((0, 0, W_BYTES), (1, 0, B_BYTES[:-1]))],
        "BYTE_COUNT_MISMATCH",
        "[1]",
    ),
    "bytes-missing": ([chunks_at((1, 0, B_BYTES))], "BYTE_COUNT_MISMATCH", "[0]"),
}

HEADERS: dict[str, tuple[list[TensorHeader], str, str]] = {
    "name-unknown": ([W, header_of("v", model()["b"])], "UNKNOWN_NAME", "[1].name"),
    "name-empty": ([header_of("", model()["w"])], "INVALID_NAME", "[0].name"),
    "name-overlong": ([header_of("x" * 3_000_000, model()["w"])], "LIMIT_EXCEEDED", "[0].name"),
    "name-twice": ([B, W, B], "INVALID_NAME", "[2].name"),
    "type-unset": ([TensorHeader(name="w", shape=[3, 5])], "INVALID_FIELD", "[0].data_type"),
    "type-of-another": (
        [header_of("w", model()["w"].half())],
        "DATA_TYPE_MISMATCH",
        "[0].data_type",
    ),
    "shape-transposed": ([header_of("w", torch.ones(5, 3))], "SHAPE_MISMATCH", "[0].shape"),
    "shape-flat": ([header_of("w", torch.ones(15))], "SHAPE_MISMATCH", "[0].shape"),
    "shape-negative": (
        [TensorHeader(name="w", data_type=W.data_type, shape=[-3, -5])],
        "INVALID_FIELD",
        "[0].shape",
    ),
    "shape-of-ten-terabytes": ([HUGE], "SHAPE_MISMATCH", "[0].shape"),
    "headers-too-many": ([W] * 10_001, "LIMIT_EXCEEDED", ""),
}

LARGE = header_of("large", torch.zeros(CHUNK_BYTES_MAX // 4 + 1))
"""A little larger than what one message may hold."""


@contextmanager
def large_session(ground: Ground) -> Iterator[str]:
    """Have a session of one parameter, ``LARGE``; yield its id."""
    spec = ground.look().session.spec
    del spec.parameters[:], spec.groups[:]
    spec.parameters.append(LARGE)
    session_id = ground.driver.create(spec).status.session_id
    yield session_id
    ground.driver.delete(session_id)
