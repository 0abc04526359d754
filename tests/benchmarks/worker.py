"""One process of a contender: its client, told step by step what to do, or its server.

::

    python -m benchmarks.worker work JOB         # requests on stdin, answers on stdout: JSON lines
    python -m benchmarks.worker serve JOB READY  # writes where it listens into the file READY
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
import torch
from benchmarks.job import Job, Peer, PeerModule, SkippedError


def main(arguments: list[str]) -> int:
    """Do one of the two; return the exit code."""
    role, job = arguments[0], Job.from_json(arguments[1])
    torch.set_num_threads(job.threads)
    module = cast("PeerModule", importlib.import_module(f"benchmarks.peers.{job.peer}"))
    if role == "work":
        return _work(module, job)
    module.serve(job, lambda address: _write_whole(Path(arguments[2]), address))
    return 0


def _work(module: PeerModule, job: Job) -> int:
    # Libraries print what they like: the answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        with module.connect(job) as peer:
            _answer(answers, {"ready": True})
            for line in sys.stdin:
                _answer(answers, _obey(peer, json.loads(line)))
    except SkippedError as reason:
        _answer(answers, {"skipped": str(reason)})
    except Exception:  # noqa: BLE001 - Whoever started us is told, and decides.
        _answer(answers, {"error": traceback.format_exc()})
        return 1
    return 0


def _obey(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    if "steps" in request:
        return {"times_s": peer.run(range(*request["steps"]))}
    tensors: dict[str, Any] = dict(peer.parameters())
    np.savez(request["save"], **tensors)
    return {"saved": request["save"]}


def _answer(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
