"""Encoded elements: the same bytes from JavaScript as from NumPy, and the same elements of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from optserve.encodings import PIECE_ELEMENTS, encoded_bytes
from optserve.v1.tensor_pb2 import Encoding
from optserve_client._encodings import CODECS

_SCRIPT = """
import { decodingTarget, encodingSource } from './src/encodings.js';

const chunks = [];
for await (const chunk of process.stdin) chunks.push(chunk);
const given = Buffer.concat(chunks);
const values = new Float32Array(Uint8Array.from(given).buffer);
const source = encodingSource(ENCODING, values);
const read = [];
for (let at = 0; at < source.byteCount; at += read.at(-1).length) read.push(source.read(at, 1001));
const data = Buffer.concat(read);
const decoded = new Float32Array(values.length);
const target = decodingTarget(ENCODING, decoded);
for (let at = 0; at < data.length; at += 333) target.write(at, data.subarray(at, at + 333));
process.stdout.write(data);
process.stdout.write(Buffer.from(decoded.buffer));
"""

_RANDOM = np.random.default_rng(20)
_BITS = _RANDOM.integers(0, 2**32, 50_000, np.uint32).view(np.float32)
# Ties, and their neighbours, at each place where a format stops.
_TIES = np.arange(2**16, dtype=np.uint32) << np.uint32(12) | np.uint32(0x00800)
CASES = [
    pytest.param(_BITS, id="any-bits"),
    pytest.param(_BITS[:257] * np.float32(1e-30), id="one-block-and-one"),
    pytest.param(_BITS[:1], id="one"),
    pytest.param(np.zeros(300, np.float32), id="zeros"),
    pytest.param(_RANDOM.standard_normal(140_001, dtype=np.float32), id="normal"),
    pytest.param(
        np.concatenate([_TIES, _TIES - np.uint32(1), _TIES << np.uint32(3)]).view(np.float32),
        id="ties",
    ),
    pytest.param(
        (_RANDOM.standard_normal(5_000) * 2.0 ** _RANDOM.integers(-150, -118, 5_000)).astype("f4"),
        id="tiny",
    ),
    pytest.param(
        np.array([3.4028235e38, 1.0, np.inf, -np.inf, np.nan, -0.0, 2.0**-149], np.float32),
        id="ends",
    ),
]


@pytest.mark.parametrize("name", ["BF16", "FP16", "INT8_BLOCKS"])
@pytest.mark.parametrize("values", CASES)
def test_javascript_makes_the_same_bytes_as_numpy(
    name: str, values: NDArray[np.float32], node: Path
) -> None:
    encoding = Encoding.Value(f"ENCODING_{name}")
    count = encoded_bytes(encoding, len(values))
    run = subprocess.run(
        ["node", "--input-type=module", "--eval", _SCRIPT.replace("ENCODING", repr(name))],
        cwd=node,
        input=values.tobytes(),
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode()
    data, decoded = run.stdout[:count], np.frombuffer(run.stdout[count:], np.float32)

    expected, elements = np.empty(count, np.uint8), np.empty_like(values)
    codec = CODECS[encoding]()
    for begin in range(0, len(values), PIECE_ELEMENTS):
        end = min(begin + PIECE_ELEMENTS, len(values))
        piece = slice(*(encoded_bytes(encoding, each) for each in (begin, end)))
        codec.encode(values[begin:end], expected[piece])
        codec.decode(expected[piece], elements[begin:end])
    assert data == expected.tobytes()
    numbers = ~np.isnan(elements)
    assert np.array_equal(numbers, ~np.isnan(decoded))
    assert np.array_equal(elements[numbers].view("u4"), decoded[numbers].view("u4"))
