"""What a process of a benchmark is told, and how its server process is started."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.model import Array, Model, Tensors, model_of
from benchmarks.training import OptimizerName

TESTS = Path(__file__).parents[1]  # Where ``python -m benchmarks`` runs.
START_TIMEOUT_S = 120.0  # Several processes import torch at once.


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one contender is to do. Travels as JSON to its processes."""

    peer: str
    """Name of the module in ``benchmarks.peers``."""
    parameters: int
    """About how many parameters the model has; see ``model_of``."""
    optimizer: OptimizerName
    threads: int
    """How many cores torch uses, wherever this contender steps."""
    host: str = "127.0.0.1"
    """Where the server listens."""
    server_prefix: tuple[str, ...] = ()
    """What the command of the server begins with: to run in another network namespace."""
    options: Mapping[str, str] = field(default_factory=dict)
    """What else the peer understands."""

    def model(self) -> Model:
        """Return the model to train."""
        return model_of(self.parameters)

    def to_json(self) -> str:
        """Write it down."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Read what ``to_json`` has written."""
        values = json.loads(text)
        return cls(**{**values, "server_prefix": tuple(values["server_prefix"])})


class SkippedError(Exception):
    """The contender cannot run here; the message says why."""


class Peer(Protocol):
    """A contender's client: it has the gradients, and gets the parameters."""

    def run(self, steps: range) -> list[float]:
        """Take the steps with these numbers, from 0; return the seconds that each took.

        A step is timed from gradients that lie ready in memory to the parameters that do.
        """
        ...

    def parameters(self) -> Tensors:
        """Return what the last step has brought."""
        ...


class PeerModule(Protocol):
    """What a module in ``benchmarks.peers`` has."""

    def connect(self, job: Job) -> AbstractContextManager[Peer]:
        """Start what it takes, hand the model over, and be ready for the first step.

        Raises:
            SkippedError: It cannot run here.
        """
        ...

    def serve(self, job: Job, announce: Callable[[str], None]) -> None:
        """Be the server process: say where it listens, and serve until it is killed."""
        ...


class BlockingPeer:
    """A peer of which a step is one call that blocks."""

    def __init__(self, job: Job) -> None:
        """Make what the job's steps send; ``values`` are the newest parameters that are known."""
        model = job.model()
        self.gradient_sets = model.gradient_sets()
        self.values: Mapping[str, Array] = model.initial()

    def run(self, steps: range) -> list[float]:
        """Take the steps with these numbers."""
        times = []
        for number in steps:
            self.prepare(self.gradient_sets[number % len(self.gradient_sets)])
            start = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - start)
        return times

    def prepare(self, gradients: Tensors) -> None:
        """Lay ``gradients`` where backward would have left them; this is not timed."""
        raise NotImplementedError

    def step(self) -> None:
        """Push the gradients, have a step taken, and have all parameters back."""
        raise NotImplementedError

    def parameters(self) -> Tensors:
        """Return what the last step has brought."""
        return self.values


@contextmanager
def serving(job: Job) -> Iterator[str]:
    """Start the server process of the job's peer; yield where it listens."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        ready = Path(folder, "ready")
        process = subprocess.Popen(
            [
                *(*job.server_prefix, sys.executable, "-m", "benchmarks.worker"),
                *("serve", job.to_json(), str(ready)),
            ],
            cwd=TESTS,
            stdin=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server of {job.peer} did not start")
                time.sleep(0.02)
            yield ready.read_text()
        finally:
            process.kill()
            process.wait()
