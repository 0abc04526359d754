"""Memory for parameters: what a client still looks at stays, and no step takes new memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray
from server_process import ServerProcess

import optserve_client as optserve
from optserve_client import ClientConfig

SGD = optserve.optim.SGD(lr=0.5)
ONES = np.ones(3, np.float32)
LARGE = np.arange(1 << 19, dtype=np.float32)  # 2 MiB: more than goes packed.

Floats: TypeAlias = NDArray[np.float32]
Connect = Callable[..., optserve.Client]


@pytest.fixture
def client(connect: Connect, server: ServerProcess) -> Iterator[optserve.Client]:
    """Yield a client whose tensors travel through the stream."""
    with connect(server.address, config=ClientConfig(lane="grpc")) as client:
        yield client


def addresses(session: optserve.Session) -> dict[str, int]:
    return {name: values.ctypes.data for name, values in session.parameters.items()}


# Of which parameters there are gradients: a step without some of them is announced.
SOME = {"large": LARGE}
ALL = {"large": LARGE, "small": ONES}


@pytest.mark.parametrize("gradients", [ALL, SOME], ids=["every-parameter", "announced"])
def test_the_parameters_of_the_step_before_stay_during_the_next_one(
    client: optserve.Client, gradients: dict[str, Floats]
) -> None:
    with client.create_session(ALL, optimizer=SGD) as session:
        for _ in range(4):
            before = dict(session.parameters)
            values = {name: array.copy() for name, array in before.items()}
            session.step(gradients)
            assert all(np.array_equal(before[name], values[name]) for name in before)
            now = session.parameters
            assert np.array_equal(now["large"], values["large"] - np.float32(0.5) * LARGE)
            assert not any(np.shares_memory(before[name], now[name]) for name in before)


@pytest.mark.parametrize("gradients", [ALL, SOME], ids=["every-parameter", "announced"])
def test_every_other_step_uses_the_same_memory(
    client: optserve.Client, gradients: dict[str, Floats]
) -> None:
    with client.create_session(ALL, optimizer=SGD) as session:
        places = []
        for _ in range(6):
            session.step(gradients)
            places.append(addresses(session))
        assert places == places[:2] * 3
        assert places[0].keys() == places[1].keys() == ALL.keys()
        assert all(places[0][name] != places[1][name] for name in ALL)


def test_a_refused_step_takes_nothing_from_what_is_known(client: optserve.Client) -> None:
    poison = np.full_like(LARGE, np.nan)
    with client.create_session({"large": LARGE}, optimizer=SGD) as session:
        session.step({"large": LARGE})
        for _ in range(3):
            before = session.parameters["large"]
            values = before.copy()
            with pytest.raises(optserve.NonFiniteGradientError):
                session.step({"large": poison})
            assert session.parameters["large"] is before
            assert np.array_equal(before, values)
            session.step({"large": LARGE})
            assert np.array_equal(before, values)
            assert np.array_equal(session.parameters["large"], values - np.float32(0.5) * LARGE)


def test_what_was_downloaded_is_nobody_elses(client: optserve.Client) -> None:
    with client.create_session({"large": LARGE}, optimizer=SGD) as session:
        session.step({"large": LARGE})
        downloaded = session.download()["large"]
        values = downloaded.copy()
        for _ in range(4):
            session.step({"large": LARGE})
        assert np.array_equal(downloaded, values)


def test_packed_steps_and_others_may_alternate(client: optserve.Client) -> None:
    expected = {"a": ONES.copy(), "b": ONES.copy()}
    with client.create_session(expected, optimizer=SGD) as session:
        for number in range(1, 9):
            before = dict(session.parameters)
            values = {name: array.copy() for name, array in before.items()}
            gradients = {"a": number * ONES}
            if number % 3:
                gradients["b"] = -number * ONES
            session.step(gradients)
            for name, gradient in gradients.items():
                expected[name] = expected[name] - np.float32(0.5) * gradient
            assert all(np.array_equal(before[name], values[name]) for name in before)
            assert all(np.array_equal(session.parameters[name], expected[name]) for name in before)
