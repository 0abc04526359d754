"""What a seed makes: a session to be trained, by how many, in what way, and what goes wrong."""

from __future__ import annotations

import asyncio
import enum
import itertools
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from random import Random

import torch
from faults.machines.history import Entry, Tensors, Training
from faults.machines.simulation.clockwork import Clockwork
from faults.machines.simulation.line import Line, Method
from google.protobuf.message import Message
from torch import Tensor

from optserve.v1.optimizer_pb2 import SGD, Adagrad, Adam
from optserve.v1.session_pb2 import (
    DURABILITY_MODE_JOURNAL,
    DURABILITY_MODE_SNAPSHOT,
    Durability,
)
from optserve_server.core.storage import StorageFailedError

_Optimizer = Callable[[Sequence[Tensor]], torch.optim.Optimizer]

RATE = 0.125
"""What a session begins with: it and its halves are exact."""

# As messages, and as torch has them; fused, as the server does by default.
_OPTIMIZERS: Sequence[tuple[Message, _Optimizer]] = (
    (SGD(lr=RATE, momentum=0.9), partial(torch.optim.SGD, lr=RATE, momentum=0.9, fused=True)),
    (Adam(lr=RATE), partial(torch.optim.Adam, lr=RATE, fused=True)),
    (Adagrad(lr=RATE), partial(torch.optim.Adagrad, lr=RATE, fused=True)),
)
# With so many tensors the server thinks a session worth a thread.
_SHAPES: Sequence[Sequence[tuple[int, ...]]] = (
    *(((3,),), ((2,), (1, 2))) * 2,
    ((1,),) * 17,
)
_WORKERS = (1, 1, 2, 3)
_STEPS_MAX = 6
_OPERATIONS = 200
_LIFE_S = 0.6  # Of a connection, on the mean: some steps.


class Promise(enum.StrEnum):
    """What is promised to a session."""

    NONE = "none"
    """Nothing, when the process ends: nor does it."""
    SNAPSHOT = "snapshot"
    """That no more than some steps are lost."""
    JOURNAL = "journal"
    """That no acknowledged step is lost with the process."""
    FSYNC = "fsync"
    """Nor with the power."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is trained, and how rough the times are."""

    optimizer: Message
    training: Training
    steps: int
    round_timeout_s: float
    breaks: bool
    """Whether connections break."""
    durability: Durability
    is_durable: bool
    operates: bool
    """Whether somebody changes the session, and saves it, while it is trained."""
    crashes_s: Sequence[float]
    """When the server's process ends."""
    crash_operations: frozenset[int]
    """At which operations of the disk it does too, counted from the first process on."""
    broken_operations: frozenset[int]
    """Which of them fail."""
    full_s: float | None
    """When the disk becomes full, for a while."""
    power: bool
    """Whether the power may go with the process."""
    disk_turn_s: float
    """How long the disk takes for something, on the mean."""
    segment_bytes_max: int
    journal_bytes_max: int

    @classmethod
    def of(cls, random: Random, promises: Sequence[Promise]) -> Setting:
        """Return a setting of chance, in which one of ``promises`` is made."""
        message, optimizer = random.choice(_OPTIMIZERS)
        shapes = random.choice(_SHAPES)
        workers = random.choice(_WORKERS)
        promise = random.choice(promises)
        durability = _durability(random, promise)
        is_durable = promise is not Promise.NONE
        harm = is_durable and random.random() < 0.9
        breaks_disk = harm and random.random() < 0.2
        return cls(
            optimizer=message,
            training=Training(
                initial=_tensors(shapes, seed=random.getrandbits(32)),
                optimizer=optimizer,
                workers=workers,
                content=partial(_content, shapes),
                rollback_max=(
                    durability.snapshot_steps if durability.mode == DURABILITY_MODE_SNAPSHOT else 0
                ),
            ),
            steps=random.randint(2, _STEPS_MAX),
            round_timeout_s=random.choice([0.05, 1.0, 600.0]),
            breaks=random.random() < 0.8,
            durability=durability,
            is_durable=is_durable,
            # What is changed behind the last snapshot may be taken back; nobody would tell when.
            operates=promise is not Promise.SNAPSHOT,
            crashes_s=[random.uniform(0, 4) for _ in range(random.randrange(4) * harm)],
            crash_operations=_drawn(random, 3 * harm),
            broken_operations=_drawn(random, breaks_disk),
            full_s=random.uniform(0, 2) if is_durable and random.random() < 0.2 else None,
            power=promise in {Promise.SNAPSHOT, Promise.FSYNC},
            disk_turn_s=random.choice([0.002, 0.03]),
            segment_bytes_max=random.choice([300, 2_000, 1 << 20]),
            journal_bytes_max=random.choice([50, 1 << 20]),
        )


class Scene:
    """What the actors of one seed share."""

    def __init__(self, seed: int, loop: Clockwork, promises: Sequence[Promise]) -> None:
        self._seed = seed
        self.loop = loop
        self.setting = Setting.of(self.random("setting"), promises)
        self.training = self.setting.training
        self.steps = self.setting.steps
        self.rest_s = 90.0  # How long a worker may rest: longer than it may stall.
        self.session_id = ""
        self.log: list[Entry] = []
        """What the workers saw."""
        self.done: set[int] = set()
        """The workers that have taken all steps, as far as they know."""
        self._is_over = False
        self.trace: list[str] = []
        """Everything that happened, with its time: the same for the same seed."""
        self.faults: list[str] = []
        """What the server must not have done."""
        self.disk_fails = False
        """Whether the disk has failed: then INTERNAL is a right answer."""
        self.lines: list[Line] = []
        """Those that may not be broken yet."""
        self.serving: set[asyncio.Task[None]] = set()
        """The calls that the server has not done with."""
        self.tolerated = {"WORKER_BUSY", "SEAT_TAKEN_OVER", "STALLED", "ROUND_TIMEOUT"}
        """Reasons that whoever has done nothing wrong may be refused for: he comes again."""
        self.context = Context()
        """What the server's calls run in."""
        self.methods: Callable[[str], Method] | None = None
        """Of the server that there is just now. None: there is none."""
        self._numbers = itertools.count()

    @property
    def is_over(self) -> bool:
        """Whether all workers have taken all steps; what is lost from now on nobody needs."""
        self._is_over = self._is_over or len(self.done) == self.training.workers
        return self._is_over

    def random(self, name: str) -> Random:
        """Return the chance of one actor, which no other one's deeds change."""
        return Random(f"{self._seed} {name}")

    def note(self, what: str) -> None:
        """Write down what has happened."""
        self.trace.append(f"{self.loop.time():.6f} {what}")

    def call(self, method: str, random: Random) -> Line:
        """Call a method of the server, over a connection that may break."""
        number = next(self._numbers)
        self.note(f"call {number}: {method}")
        line = Line(
            self.loop,
            self.random(f"line {number}"),
            self._take_fault,
            f"ipv4:198.51.100.1:{number}",
        )
        if self.methods is None:
            line.break_now()
            return line
        serving = line.begin(self.methods(method), self.context, streams=method == "Train")
        self.serving.add(serving)
        serving.add_done_callback(self.serving.discard)
        self.lines = [*(each for each in self.lines if not each.is_broken), line]
        if self.setting.breaks:
            line.break_later(_LIFE_S * random.uniform(0.2, 2))
        return line

    def _take_fault(self, what: str, error: BaseException | None) -> None:
        if not (self.disk_fails and isinstance(error, StorageFailedError)):
            self.faults.append(f"{what}: {error!r}")


def _durability(random: Random, promise: Promise) -> Durability:
    """Return one that keeps a promise."""
    if promise is Promise.NONE:
        return Durability()
    snapshots = promise is Promise.SNAPSHOT
    return Durability(
        mode=DURABILITY_MODE_SNAPSHOT if snapshots else DURABILITY_MODE_JOURNAL,
        snapshot_steps=random.randint(1, 4),
        snapshot_s=random.choice([0.3, 100.0]),
        fsync=promise is Promise.FSYNC,
    )


def _drawn(random: Random, count: int) -> frozenset[int]:
    """Return some of the first operations of a disk: a session takes some hundreds."""
    return frozenset(random.randrange(_OPERATIONS) for _ in range(count))


def _tensors(shapes: Sequence[tuple[int, ...]], *, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {f"p{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}


def _content(shapes: Sequence[tuple[int, ...]], digest: bytes) -> Tensors:
    """Return the gradients that a digest stands for."""
    return _tensors(shapes, seed=int.from_bytes(digest, "little") >> 1)
