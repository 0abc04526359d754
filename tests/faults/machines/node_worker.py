"""A worker of a session that is a process of its own, and the Node client."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from sources import ROOT

import optserve_client as optserve
from optserve_client.tensors import Array

_PROGRAM = Path(__file__).with_suffix(".js")
_ANSWER_TIMEOUT_S = 300.0  # Of a step whose connection breaks again and again.


def why_there_is_no_node() -> str:
    """Return what the Node client lacks; empty if it can run."""
    if shutil.which("node") is None:
        return "node is not installed"
    if not (ROOT / "client" / "node" / "node_modules").is_dir():
        return "its packages are not installed"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    step: int


class NodeWorker:
    """One worker's session in a Node process; see courses.Attendee. Tensors are FP32."""

    def __init__(
        self, process: subprocess.Popen[str], *, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Talk to ``process``; the parameters have ``shapes``."""
        self._process = process
        self._shapes = shapes
        self.parameters: Mapping[str, Array] = {}
        self.steps: int = self._told()["steps"]

    @classmethod
    @contextmanager
    def joined(
        cls,
        address: str,
        session_id: str,
        worker: int,
        *,
        via: optserve.Via,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> Iterator[Self]:
        """Take part in a session for a block."""
        command = ["node", str(_PROGRAM), address, session_id, str(worker), via]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
            try:
                yield cls(process, shapes=shapes)
                process.communicate(timeout=_ANSWER_TIMEOUT_S)
            finally:
                process.kill()

    def step(self, gradients: Mapping[str, Array], *, step: int) -> _Answer:
        """Take a step, and keep the parameters that it brings."""
        sent = {
            name: base64.b64encode(value.tobytes()).decode() for name, value in gradients.items()
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"step": step, "gradients": sent}) + "\n")
        self._process.stdin.flush()
        told = self._told()
        self.parameters = {
            name: np.frombuffer(base64.b64decode(text), np.float32).reshape(self._shapes[name])
            for name, text in told["parameters"].items()
        }
        self.steps = told["step"]
        return _Answer(step=self.steps)

    def resume(self) -> None:
        """Is for sessions that lose steps."""
        raise AssertionError("the server was not restarted")

    def _told(self) -> Any:  # noqa: ANN401 - What the program says.
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        impatience = threading.Timer(_ANSWER_TIMEOUT_S, self._process.kill)
        impatience.start()
        try:
            line = self._process.stdout.readline()
        finally:
            impatience.cancel()
        assert line, f"the Node client has ended: {self._process.stderr.read()}"
        return json.loads(line)
