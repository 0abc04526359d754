"""Connections that are cut anywhere: the client goes on by itself, and nothing happens twice."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from faces import Connect, connecting
from numpy.typing import NDArray
from relay import Relay, relay
from server_process import ServerProcess
from unit.client.loops import assert_same_bits, layers, remote
from unit.client.loops import train as step_torch

import optserve_client as optserve
from optserve_client import ClientConfig, Retry, TransferProgress, Wire

STEPS = 8
SGD = optserve.optim.SGD(lr=0.1, momentum=0.9)
HASTY = Retry(backoff_s=0.01, backoff_max_s=0.1)
ONES = np.ones(3, np.float32)
TWOS = np.full(5_000, 2, np.float32)
LARGE_VALUES = np.arange(1 << 20, dtype=np.float32)  # 4 MiB: several messages.

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


def test_steps_in_shared_memory_that_are_cut_anywhere_are_applied_once(
    wire: Relay, server: ServerProcess
) -> None:
    with optserve.connect(server.address, config=config("grpc"), progress=False) as undisturbed:
        norms, parameters = train(undisturbed, "chunked")
    with optserve.connect(wire.address, config=config("shm"), progress=False) as client:
        cut_norms, cut_parameters = train(client, "chunked", Cutter(wire, 150, seed=3))
    assert wire.cuts >= 3
    assert cut_norms == norms
    assert_same(cut_parameters, parameters)


def test_gradients_that_lie_in_shared_memory_alone_survive_the_connection(wire: Relay) -> None:
    cutter = Cutter(wire, 100, seed=4)
    with (
        optserve.connect(wire.address, config=config("shm"), progress=False) as client,
        client.create_session({"w": ONES}, optimizer=optserve.optim.SGD(lr=1)) as session,
    ):
        buffers = session.gradient_buffers()
        for step in range(1, STEPS + 1):
            buffers["w"][:] = 2**step
            cutter.arm()
            assert session.step(buffers).step == step
        assert session.parameters["w"].tolist() == [1.0 - sum(2**k for k in range(1, 9))] * 3
    assert wire.cuts >= 3


@pytest.mark.parametrize("lane", ["grpc", "shm"])
def test_steps_that_overlap_with_the_backward_pass_are_cut_anywhere_and_applied_once(
    lane: optserve.Lane, wire: Relay
) -> None:
    model, local = layers(), layers()
    reference = torch.optim.SGD(local.parameters(), lr=0.1, fused=False)
    cutter = Cutter(wire, 150 if lane == "shm" else 4_900_000, seed=5)
    with (
        optserve.connect(wire.address, config=config(lane), progress=False) as client,
        remote(model, client) as optimizer,
    ):
        for seed in range(STEPS):
            cutter.arm()
            step_torch(model, optimizer, seed)
            step_torch(local, reference, seed)
            assert_same_bits(model, local)
        assert optimizer.session.steps == STEPS
    assert wire.cuts >= 3


CALLS: dict[str, Callable[[optserve.Session], object]] = {
    "status": lambda session: session.status().steps,
    "upload": lambda session: session.upload({"w": TWOS}).steps,
    "download": lambda session: session.download()["w"].tobytes(),
    "update": lambda session: session.update(optimizer=optserve.optim.SGD(lr=0.25)).spec.optimizer,
    "end-epoch": lambda session: session.end_epoch(epoch=1).epochs,
    "loss": lambda session: session.evaluate_loss(TWOS, TWOS, via="unary").loss,
    "loss-stream": lambda session: session.evaluate_loss(TWOS, TWOS, via="stream").loss,
    "loss-points": lambda session: len(session.loss_points(page_size=1)),
    "contribution": lambda session: session.contribution().applied,
    "resume": lambda session: session.resume()["w"].tobytes(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("way", ["sent", "answered"])
def test_a_call_that_is_cut_is_made_again(
    call: Callable[[optserve.Session], object], way: str, connect: Connect, wire: Relay
) -> None:
    values = {"w": np.ones(5_000, np.float32)}
    with (
        connect(wire.address, progress=False) as client,
        client.create_session(values, optimizer=SGD, loss=optserve.nn.MSELoss()) as session,
    ):
        session.step({"w": TWOS})
        session.evaluate_loss(TWOS, TWOS, split="train")
        session.evaluate_loss(TWOS, TWOS, split="train")
        expected = call(session)
        for count in (0, 20, 60, 90):  # Some calls are shorter than that.
            wire.cut_after(**{way: count})
            assert call(session) == expected
    assert wire.cuts >= 2


@pytest.mark.parametrize("count", [0, 100, 20_000, 1_300_000])
@pytest.mark.parametrize("way", ["sent", "answered"])
def test_a_session_whose_creation_is_cut_is_there_once(
    way: str, count: int, connect: Connect, wire: Relay, server: ServerProcess
) -> None:
    with (
        connect(wire.address, progress=False) as client,
        optserve.connect(server.address) as keeper,
    ):
        before = len(list(keeper.list_sessions()))
        wire.cut_after(**{way: count if way == "sent" else count // 1_000})
        with client.create_session({"w": LARGE_VALUES}, optimizer=SGD) as session:
            assert len(list(keeper.list_sessions())) == before + 1
            assert np.array_equal(session.download()["w"], LARGE_VALUES)
        assert len(list(keeper.list_sessions())) == before


@pytest.mark.parametrize("way", ["sent", "answered"])
def test_a_deletion_that_is_cut_has_deleted(
    way: str, connect: Connect, wire: Relay, server: ServerProcess
) -> None:
    with (
        connect(wire.address, progress=False) as client,
        optserve.connect(server.address) as keeper,
    ):
        for count in (0, 20, 80, 150):
            session = client.create_session({"w": ONES}, optimizer=SGD)
            wire.cut_after(**{way: count})
            assert session.delete().session_id == session.session_id
            with pytest.raises(optserve.SessionNotFoundError):
                keeper.delete_session(session.session_id)


def test_an_upload_that_is_cut_begins_again_and_says_so(connect: Connect, wire: Relay) -> None:
    told: list[TransferProgress] = []
    with (
        connect(wire.address, progress=told.append) as client,
        client.create_session({"w": LARGE_VALUES}, optimizer=SGD) as session,
    ):
        told.clear()
        wire.cut_after(sent=3_000_000)
        session.upload({"w": LARGE_VALUES + 1})
        assert np.array_equal(session.download()["w"], LARGE_VALUES + 1)
    done = [each.done_bytes for each in told if each.direction == "upload"]
    assert done.count(0) == 2
    assert done[-1] == LARGE_VALUES.nbytes
