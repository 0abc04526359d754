"""What a seed makes: a session to be trained, by how many, in what way, and what goes wrong."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
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

_Optimizer = Callable[[Sequence[Tensor]], torch.optim.Optimizer]

# As messages, and as torch has them; fused, as the server does by default.
_OPTIMIZERS: Sequence[tuple[Message, _Optimizer]] = (
    (SGD(lr=0.1, momentum=0.9), partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True)),
    (Adam(lr=0.1), partial(torch.optim.Adam, lr=0.1, fused=True)),
    (Adagrad(lr=0.1), partial(torch.optim.Adagrad, lr=0.1, fused=True)),
)
# With so many tensors the server thinks a session worth a thread.
_SHAPES: Sequence[Sequence[tuple[int, ...]]] = (((3,),), ((2,), (1, 2)), ((1,),) * 17)
_WORKERS = (1, 1, 2, 3)
_STEPS_MAX = 6
_LIFE_S = 0.6  # Of a connection, on the mean: some steps.


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is trained, and how rough the times are."""

    optimizer: Message
    training: Training
    steps: int
    round_timeout_s: float
    breaks: bool
    """Whether connections break."""

    @classmethod
    def of(cls, random: Random) -> Setting:
        """Return a setting of chance."""
        message, optimizer = random.choice(_OPTIMIZERS)
        shapes = random.choice(_SHAPES)
        workers = random.choice(_WORKERS)
        return cls(
            optimizer=message,
            training=Training(
                initial=_tensors(shapes, seed=random.getrandbits(32)),
                optimizer=optimizer,
                workers=workers,
                content=partial(_content, shapes),
            ),
            steps=random.randint(2, _STEPS_MAX),
            round_timeout_s=random.choice([0.05, 1.0, 600.0]),
            breaks=random.random() < 0.8,
        )


class Scene:
    """What the actors of one seed share."""

    def __init__(self, seed: int, loop: Clockwork) -> None:
        self._seed = seed
        self.loop = loop
        self.setting = Setting.of(self.random("setting"))
        self.training = self.setting.training
        self.steps = self.setting.steps
        self.rest_s = 90.0  # How long a worker may rest: longer than it may stall.
        self.session_id = ""
        self.log: list[Entry] = []
        """What the workers saw."""
        self.trace: list[str] = []
        """Everything that happened, with its time: the same for the same seed."""
        self.faults: list[str] = []
        """What the server must not have done."""
        self.serving: set[asyncio.Task[None]] = set()
        """The calls that the server has not done with."""
        self.methods: Callable[[str], Method]
        """The methods of the server that there is just now."""
        self._numbers = itertools.count()

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
            self.faults.append,
            f"ipv4:198.51.100.1:{number}",
        )
        task = line.begin(self.methods(method), streams=method == "Train")
        self.serving.add(task)
        task.add_done_callback(self.serving.discard)
        if self.setting.breaks:
            line.break_later(_LIFE_S * random.uniform(0.2, 2))
        return line


def _tensors(shapes: Sequence[tuple[int, ...]], *, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {f"p{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}


def _content(shapes: Sequence[tuple[int, ...]], digest: bytes) -> Tensors:
    """Return the gradients that a digest stands for."""
    return _tensors(shapes, seed=int.from_bytes(digest, "little") >> 1)
