"""Models of any size train through messages of 4 MiB, and cost little more than themselves."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from server_process import running_server

import optserve_client as optserve

MIB = 1 << 20
STEPS = 2
LR = 0.5


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "elements",
    [
        pytest.param(5_000_000, id="five-million"),
        pytest.param(100_000_000, id="hundred-million", marks=pytest.mark.large),
    ],
)
def test_a_large_model_trains_through_default_message_limits(elements: int) -> None:
    rest = elements // 3 + 1  # Tensors that end in the middle of a chunk.
    shapes = {"embedding": (elements - rest - 3,), "head": (rest,), "bias": (3,)}
    values = {name: _pattern(shape[0], seed=1) for name, shape in shapes.items()}
    gradients = {name: _pattern(shape[0], seed=2) for name, shape in shapes.items()}
    with running_server() as server, optserve.connect(server.address, progress=False) as client:
        idle_bytes = server.resident_bytes()
        limits = client.server_info().limits
        assert limits.message_bytes_max == 4 * MIB
        with client.create_session(values, optimizer=optserve.optim.SGD(lr=LR)) as session:
            for _ in range(STEPS):
                result = session.step(gradients)
            assert result.step == STEPS
            for name, value in values.items():
                # In halves of powers of two every step is exact.
                wanted = value - STEPS * LR * gradients[name]
                assert np.array_equal(session.parameters[name], wanted)
            reserved_bytes = session.status().reserved_bytes
        # Beside the session there was its upload, and what was on the way.
        model_bytes = 4 * elements
        assert server.peak_bytes() < idle_bytes + reserved_bytes + model_bytes + 200 * MIB
        assert reserved_bytes < 2.1 * model_bytes


def _pattern(size: int, seed: int) -> NDArray[np.float32]:
    """Return multiples of 1/8 that differ from one element to the next."""
    values = np.arange(size, dtype=np.float32)
    values *= 7 * seed
    np.mod(values, 64, out=values)
    values /= 8
    return values
