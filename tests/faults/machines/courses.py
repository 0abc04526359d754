"""Courses of training that real clients take while something breaks, and their histories."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Protocol

import numpy as np
import torch
from faces import Face, connecting
from faults.machines.history import Entry, Saw, Tensors, Training, hash_of
from torch import Tensor

import optserve_client as optserve
from optserve_client.optim import AnyOptimizer
from optserve_client.tensors import Array

Shapes = Mapping[str, tuple[int, ...]]

SMALL: Shapes = {"w": (300,), "b": (7,)}
MIDDLE: Shapes = {"w": (200, 300), "b": (7,)}
LARGE: Shapes = {"w": (300_000,), "b": (7,), "last": (400, 500)}
"""Two messages each way."""

_NONE = optserve.Durability()
_Optimizer = Callable[[Sequence[Tensor]], torch.optim.Optimizer]

_OPTIMIZERS: Sequence[tuple[AnyOptimizer, _Optimizer]] = (
    (
        optserve.optim.SGD(lr=0.1, momentum=0.9),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    ),
    (optserve.optim.Adam(lr=0.01), partial(torch.optim.Adam, lr=0.01, fused=True)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What a session trains, and for how long."""

    name: str
    """What all of its numbers come from."""
    shapes: Shapes
    optimizer: AnyOptimizer
    torch_optimizer: _Optimizer
    workers: int
    steps: int
    via: optserve.Via = "stream"

    @classmethod
    def of(cls, random: Random, *, sizes: Sequence[Shapes], workers: int, steps: int) -> Course:
        """Return a course of chance."""
        optimizer, torch_optimizer = random.choice(_OPTIMIZERS)
        shapes = random.choice(sizes)
        return cls(
            name=random.randbytes(4).hex(),
            shapes=shapes,
            optimizer=optimizer,
            torch_optimizer=torch_optimizer,
            workers=workers,
            steps=steps,
            via="unary" if shapes is SMALL and random.random() < 0.3 else "stream",
        )

    @property
    def byte_count(self) -> int:
        """How many bytes a step brings, each way."""
        return sum(4 * int(np.prod(shape)) for shape in self.shapes.values())

    def training(self, *, rollback_max: int = 0) -> Training:
        """Return what torch has to do again."""
        return Training(
            initial=self.content(b"initial"),
            optimizer=self.torch_optimizer,
            workers=self.workers,
            content=self.content,
            rollback_max=rollback_max,
        )

    def digest(self, worker: int, step: int) -> bytes:
        """Return what a contribution is known by here."""
        return f"{worker} {step}".encode()

    def content(self, digest: bytes) -> Tensors:
        """Return the numbers that a digest stands for."""
        source = hashlib.blake2b(self.name.encode() + digest, digest_size=8).digest()
        rng = np.random.default_rng(int.from_bytes(source, "little"))
        return {
            name: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
            for name, shape in self.shapes.items()
        }


class Attendee(Protocol):
    """One worker's session, of whatever client."""

    @property
    def steps(self) -> int:
        """How many steps are known to have been applied."""
        ...

    @property
    def parameters(self) -> Mapping[str, Array]:
        """The newest values."""
        ...

    def step(self, gradients: Mapping[str, Array], *, step: int) -> Stepped:
        """Take the step of this number."""
        ...

    def resume(self) -> object:
        """Go on from where the session stands."""
        ...


class Stepped(Protocol):
    """The answer to a step."""

    @property
    def step(self) -> int:
        """Its number."""
        ...


@contextmanager
def connected(
    address: str, config: optserve.ClientConfig, face: Face = "blocking"
) -> Iterator[optserve.Client]:
    """Connect, as often as it takes while a client would bear with its server.

    A client itself does not: that there is a server at all is for the caller to believe.
    """
    deadline_s = time.monotonic() + config.retry.give_up_after_s
    with ExitStack() as stack:
        connect = stack.enter_context(connecting(face, config))
        while True:
            try:
                client = connect(address, progress=False)
            except optserve.UnavailableError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(config.retry.backoff_s)
                continue
            yield stack.enter_context(client)
            return


def create(
    client: optserve.Client, course: Course, durability: optserve.Durability = _NONE
) -> optserve.Session:
    """Create the course's session."""
    return client.create_session(
        _arrays(course.content(b"initial")),
        optimizer=course.optimizer,
        workers=course.workers,
        via=course.via,
        durability=durability,
    )


def attend(session: Attendee, course: Course, worker: int, log: list[Entry]) -> None:
    """Take the course's steps as one of its workers, and write down what it saw."""
    step = session.steps + 1
    while step <= course.steps:
        digest = course.digest(worker, step)
        log.append(Entry(worker=worker, saw=Saw.SENT, step=step, digest=digest))
        try:
            result = session.step(_arrays(course.content(digest)), step=step)
        except optserve.StepsLostError as error:
            log.append(Entry(worker=worker, saw=Saw.TOLD, step=error.resumes_from - 1))
            session.resume()
            step = error.resumes_from
            continue
        assert result.step == step, f"step {step} was answered by {result}"
        seen = hash_of(tensors_of(session.parameters))
        log.append(
            Entry(worker=worker, saw=Saw.ANSWERED, step=step, digest=digest, parameters=seen)
        )
        step += 1


def tensors_of(parameters: Mapping[str, Array]) -> Tensors:
    """Return copies of parameters."""
    return {name: torch.from_numpy(np.array(value)) for name, value in parameters.items()}


def _arrays(tensors: Tensors) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}
