"""Connections that are cut anywhere: the client goes on by itself, and nothing happens twice."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import pytest
from faces import Connect, connecting
from numpy.typing import NDArray
from relay import Relay, relay
from server_process import ServerProcess

import optserve_client as optserve
from optserve_client import ClientConfig, Retry, Wire

STEPS = 8
SGD = optserve.optim.SGD(lr=0.1, momentum=0.9)
HASTY = Retry(backoff_s=0.01, backoff_max_s=0.1)
ONES = np.ones(3, np.float32)

Floats: TypeAlias = NDArray[np.float32]


@pytest.fixture
def wire(server: ServerProcess) -> Iterator[Relay]:
    with relay(server.address) as wire:
        yield wire


def config(lane: optserve.Lane) -> ClientConfig:
    return ClientConfig(lane=lane, retry=HASTY)


@pytest.fixture(params=["blocking", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    with connecting(request.param, config("grpc")) as connect:
        yield connect


Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

LARGE: Shapes = {"w": (300_000,), "b": (7,), "last": (400, 500)}
SMALL: Shapes = {"w": (300,), "b": (7,)}

FORMS: dict[str, tuple[Shapes, dict[str, Any], int]] = {
    "packed": (SMALL, {}, 2_000),
    "chunked": (LARGE, {}, 2_001_000),
    "unary": (SMALL, {"via": "unary"}, 2_000),
    "bf16": (LARGE, {"wire": Wire(gradients="BF16", parameters="BF16")}, 1_001_000),
    "int8": (LARGE, {"wire": Wire(gradients="INT8_BLOCKS", parameters="INT8_BLOCKS")}, 505_000),
    "int8-packed": (
        SMALL,
        {"wire": Wire(gradients="INT8_BLOCKS", parameters="INT8_BLOCKS")},
        1_000,
    ),
}
"""Shapes, options, and about how many bytes a step sends and brings."""


def gradients(shapes: Shapes, step: int) -> dict[str, Floats]:
    rng = np.random.default_rng(step)
    drawn = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    if step % 3 == 0 and len(shapes) > 2:
        del drawn["b"]  # And so the others are announced.
    return drawn


class Cutter:
    """Cuts a wire at a moment that is drawn at random, in each step anew."""

    def __init__(self, wire: Relay, byte_count: int, seed: int) -> None:
        self._wire = wire
        self._byte_count = byte_count
        self._random = random.Random(seed)

    def arm(self) -> None:
        count = self._random.randrange(self._byte_count)
        if self._random.random() < 0.5:
            self._wire.cut_after(sent=count)
        else:
            self._wire.cut_after(answered=count)


def train(
    client: optserve.Client, form: str, cutter: Cutter | None = None
) -> tuple[list[float], dict[str, Floats]]:
    """Take steps; return their norms, and the parameters after them."""
    shapes, options, _ = FORMS[form]
    values = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    norms = []
    with client.create_session(values, optimizer=SGD, **options) as session:
        for step in range(1, STEPS + 1):
            if cutter:
                cutter.arm()
            result = session.step(gradients(shapes, step))
            assert (result.step, session.steps) == (step, step)
            norms.append(result.gradient_norm)
        assert session.status().steps == STEPS
        return norms, dict(session.download())


def assert_same(ours: dict[str, Floats], theirs: dict[str, Floats]) -> None:
    assert {name: each.tobytes() for name, each in ours.items()} == {
        name: each.tobytes() for name, each in theirs.items()
    }


@pytest.mark.parametrize("form", FORMS)
def test_steps_that_are_cut_anywhere_are_applied_once(
    form: str, connect: Connect, wire: Relay, server: ServerProcess
) -> None:
    with optserve.connect(server.address, config=config("grpc")) as undisturbed:
        norms, parameters = train(undisturbed, form)
    with connect(wire.address, progress=False) as client:
        cutter = Cutter(wire, FORMS[form][2], seed=len(form))
        cut_norms, cut_parameters = train(client, form, cutter)
    assert wire.cuts >= 3
    assert cut_norms == norms
    assert_same(cut_parameters, parameters)
