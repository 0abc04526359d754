"""Bytes that are nearly right, for every decoder: none may crash, hang, or contradict another."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from random import Random

from faults.machines.decoders import DECODERS, Decoder
from faults.machines.frame import FAULTY, Effort, Report
from faults.machines.mutation import mutated

_INPUT_BYTES_MAX = 4096
_HANG_S = 10  # Of one input: what is decoded here takes milliseconds.
_LINES_SHOWN = 30
_ADVANCE = 1_000


def decode(effort: Effort) -> Report:
    """Feed all decoders, each with its share."""
    share = -(-effort.count // len(DECODERS))
    feed = _feed_guided if effort.thorough else _feed_mutated
    failures = [
        failure
        for name, decoder in DECODERS.items()
        if (failure := feed(name, decoder, share, effort))
    ]
    how = "guided by coverage" if effort.thorough else "mutated by chance"
    return Report(
        tried=share * len(DECODERS),
        notes=(f"{len(DECODERS)} decoders, {how}",),
        failures=tuple(failures),
    )


def _feed_mutated(name: str, decoder: Decoder, count: int, effort: Effort) -> str | None:
    """Feed a decoder in this process; return what was wrong."""
    random = Random(effort.seed)
    for done in range(count):
        data = mutated(random, decoder.examples)
        try:
            decoder.take(data)
        except Exception:  # noqa: BLE001 - Whatever it is, it was not declared.
            return f"{name}: {data.hex()}\n{traceback.format_exc()}"
        if done % _ADVANCE == 0:
            effort.advance(min(_ADVANCE, count - done))
    return None


def _feed_guided(name: str, decoder: Decoder, count: int, effort: Effort) -> str | None:
    """Feed a decoder in a process that watches which of its lines run; return what was wrong."""
    FAULTY.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="optserve-examples-") as folder:
        for position, example in enumerate(decoder.examples):
            Path(folder, str(position)).write_bytes(example)
        command = [sys.executable, "-m", "faults.machines.guided", name, folder]
        command += [f"-atheris_runs={count}", f"-seed={effort.seed % 2**31 or 1}"]
        command += [f"-max_len={_INPUT_BYTES_MAX}", f"-timeout={_HANG_S}"]
        command += [f"-artifact_prefix={FAULTY}/{name}-"]
        done = subprocess.run(  # Its exit code is looked at below.
            command, check=False, capture_output=True, text=True, errors="replace"
        )
    effort.advance(count)
    if done.returncode == 0:
        return None
    lines = (done.stdout + done.stderr).splitlines()[-_LINES_SHOWN:]
    return f"{name}: exit code {done.returncode}\n" + "\n".join(lines)
