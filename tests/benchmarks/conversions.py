"""What encodings cost in the processor, beside what they save on the wire.

  cd tests && ../.venv/bin/python -m benchmarks.conversions

Every conversion takes the way that it takes in a step: through a source or a target of the wire,
a message at a time, in one thread. Medians of several rounds of that thread's processor time.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from optserve.allocator import keep_freed_memory
from optserve.encodings import encoded_bytes
from optserve.limits import CHUNK_BYTES_MAX
from optserve.v1.tensor_pb2 import Encoding
from optserve.wire import Buffer, Source, Target
from optserve_client._digest import StepDigest
from optserve_client._encoded import GradientSources, parameter_targets
from optserve_server.core.spec import Encoding as CoreEncoding
from optserve_server.rpc.encoded import GradientTargets, ParameterSources

ELEMENTS = 25_000_000
ROUNDS = 7
BITS_PER_S = 2e9
_NODE = Path(__file__).parents[2] / "client" / "node"
_NODE_SCRIPT = """
import { decodingTarget, encodingSource } from './src/encodings.js';
const [encoding, count] = ['NAME', COUNT];
const values = Float32Array.from({ length: count }, (_, i) => Math.sin(i));
const median = (times) => times.sort((a, b) => a - b)[Math.floor(times.length / 2)];
const [sending, receiving] = [[], []];
for (let round = 0; round < ROUNDS; round += 1) {
  const source = encodingSource(encoding, values);
  const parts = [];
  let began = process.cpuUsage();
  for (let at = 0; at < source.byteCount; at += parts.at(-1).length) {
    parts.push(source.read(at, 1 << 20));
  }
  sending.push(process.cpuUsage(began).user / 1e3);
  const target = decodingTarget(encoding, values);
  began = process.cpuUsage();
  let at = 0;
  for (const part of parts) {
    target.write(at, part);
    at += part.length;
  }
  receiving.push(process.cpuUsage(began).user / 1e3);
}
console.log(JSON.stringify([median(sending), median(receiving)]));
"""


def main() -> None:
    """Measure, and print a table."""
    keep_freed_memory()  # As the server does.
    values = np.random.default_rng(1).standard_normal(ELEMENTS, dtype=np.float32)
    table = Table(title=f"{ELEMENTS / 1e6:.0f} M elements, milliseconds of a processor")
    for heading in ("", "wire saves", "client sends", "server receives"):
        table.add_column(heading, justify="right" if heading else "left")
    for heading in ("server sends", "client receives", "Node sends", "Node receives"):
        table.add_column(heading, justify="right")
    table.add_row("copied, as FP32", "", *_shown(_ways(Encoding.ENCODING_UNSPECIFIED, values)))
    for encoding in (
        Encoding.ENCODING_BF16,
        Encoding.ENCODING_FP16,
        Encoding.ENCODING_INT8_BLOCKS,
    ):
        name = Encoding.Name(encoding).removeprefix("ENCODING_")
        saved_s = (4 * ELEMENTS - encoded_bytes(encoding, ELEMENTS)) * 8 / BITS_PER_S
        table.add_row(
            name,
            f"{saved_s * 1e3:.0f}",
            *_shown(_ways(encoding, values)),
            *(f"{milliseconds:.0f}" for milliseconds in _node(name)),
        )
    Console(width=120).print(table)


def _ways(encoding: Encoding.ValueType, values: NDArray[np.float32]) -> list[float]:
    """Return the seconds that each way through a step takes, in its order."""
    name = Encoding.Name(encoding).removeprefix("ENCODING_").replace("UNSPECIFIED", "PLAIN")
    gradients, sources = GradientSources(encoding), ParameterSources(CoreEncoding(name))
    targets = GradientTargets(CoreEncoding(name))
    staging, parameters = torch.zeros(ELEMENTS), torch.from_numpy(values.copy())
    received, reference = np.zeros_like(values), np.zeros_like(values)
    buffer = Buffer(received.view(np.uint8).data)
    message = memoryview(bytearray(4 * ELEMENTS))
    times: list[list[float]] = [[], [], [], []]
    for step in range(1, ROUNDS + 3):
        (source,) = gradients.of(step, StepDigest(["w"]), ["w"], [values.view(np.uint8).data])
        data = _read(source, message, times[0])
        gradients.answered(step)
        _write(targets.of([staging])[0], data, times[1])
        parameters += staging
        (source,) = sources.of([parameters])
        data = _read(source, message, times[2])
        (target,) = parameter_targets(sources.encoding, [buffer], [reference])
        sources.delivered()
        _write(target, data, times[3])
    # The first step takes the memory, and the second one what its residuals need.
    return [statistics.median(each[2:]) for each in times]


def _read(source: Source, message: memoryview, times: list[float]) -> memoryview:
    """Copy a source's bytes into memory that has been used before, as a message's codec does."""
    at = 0
    began = time.thread_time()
    while at < source.byte_count:
        part = source.read(at, CHUNK_BYTES_MAX)
        message[at : at + len(part)] = part
        at += len(part)
    times.append(time.thread_time() - began)
    return message[:at]


def _write(target: Target, data: memoryview, times: list[float]) -> None:
    began = time.thread_time()
    for at in range(0, len(data), CHUNK_BYTES_MAX):
        target.write(at, data[at : at + CHUNK_BYTES_MAX])
    times.append(time.thread_time() - began)


def _node(name: str) -> list[float]:
    """Return the milliseconds that the Node client needs to send and to receive."""
    if shutil.which("node") is None:
        return []
    replaced: dict[str, str] = {"NAME": name, "COUNT": str(ELEMENTS), "ROUNDS": str(ROUNDS)}
    script = _NODE_SCRIPT
    for word, text in replaced.items():
        script = script.replace(word, text)
    arguments = ["node", "--input-type=module", "--eval", script]
    run = subprocess.run(arguments, cwd=_NODE, capture_output=True, text=True, check=True)
    milliseconds: list[float] = json.loads(run.stdout)
    return milliseconds


def _shown(seconds: list[float]) -> list[str]:
    return [f"{each * 1e3:.0f}" for each in seconds]


if __name__ == "__main__":
    main()
