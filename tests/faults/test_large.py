"""A model of a hundred million parameters trains through default message limits."""

from __future__ import annotations

import numpy as np
import pytest
from server_process import ServerProcess, running_server

import optserve_client as optserve


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(5_000_000, id="5M"),
        pytest.param(100_000_000, id="100M", marks=[pytest.mark.large, pytest.mark.timeout(600)]),
    ],
)
def test_a_large_model_trains_through_default_message_limits(count: int) -> None:
    with running_server() as process:
        _train(process, count)
        # The parameters, one gradient, the upload while it lasts, and torch itself.
        assert process.peak_bytes() < 3 * 4 * count + (1 << 30)


def _train(process: ServerProcess, count: int) -> None:
    sizes = {"embedding": count // 2, "head": count - count // 2 - 1, "scale": 1}
    parameters = {name: np.zeros(size, np.float32) for name, size in sizes.items()}
    gradients = {name: np.full(size, 0.5, np.float32) for name, size in sizes.items()}
    with (
        optserve.connect(process.address) as client,
        client.create_session(parameters, optimizer=optserve.optim.SGD(lr=0.5)) as session,
    ):
        for step in (1, 2):
            result = session.step(gradients)
            assert result.step == step
            assert result.gradient_norm == pytest.approx(0.5 * count**0.5, rel=1e-3)
        for value in session.parameters.values():
            assert value.min() == value.max() == np.float32(-0.5)
