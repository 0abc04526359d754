"""What a session reserves is what torch really takes, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from messages import message_of
from scenarios.models import spec

from optserve.v1.loss_pb2 import CrossEntropyLoss
from optserve.v1.optimizer_pb2 import SGD
from optserve_server.core.admission import Budget, session_bytes
from optserve_server.core.errors import LimitExceededError, MemoryExhaustedError
from optserve_server.core.events import NullObserver
from optserve_server.core.limits import Limits
from optserve_server.rpc.decode_spec import session_spec

TESTS = Path(__file__).parents[2]
SLACK_BYTES = 1 << 20  # Of what else happens in a process between two looks.


def _measured(module: str) -> dict[str, tuple[int, int]]:
    """Measure every case of a module: bytes reserved, and bytes taken at most."""
    # Every large tensor gets memory of its own, and gives it back when it goes.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", f"unit.core.{module}"]
    run = subprocess.run(
        command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    results: dict[str, tuple[int, int]] = json.loads(run.stdout)
    return results


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[int, int]]:
    """Measure sessions."""
    return _measured("measure_sessions")


def test_no_session_takes_more_than_it_reserves(measured: dict[str, tuple[int, int]]) -> None:
    assert len(measured) > 80
    over = {
        name: (reserved, taken)
        for name, (reserved, taken) in measured.items()
        if taken > reserved + SLACK_BYTES
    }
    assert over == {}


def test_a_fused_session_reserves_no_more_than_it_takes(
    measured: dict[str, tuple[int, int]],
) -> None:
    """Of the others the most that torch may hold at a time is reserved, which few reach."""
    fused = {
        name: each
        for name, each in measured.items()
        if "'fused': True" in name and name.endswith("FP32")
    }
    assert len(fused) == 16
    for name, (reserved, taken) in fused.items():
        assert reserved < taken + SLACK_BYTES, name


def test_no_evaluation_takes_more_than_it_reserves() -> None:
    evaluations = _measured("measure_evaluations")
    assert len(evaluations) > 80
    over = {
        name: (reserved, taken)
        for name, (reserved, taken) in evaluations.items()
        if taken > reserved + SLACK_BYTES
    }
    assert over == {}


def test_no_session_takes_more_than_it_reserves_while_it_comes_back() -> None:
    recoveries = _measured("measure_recoveries")
    assert len(recoveries) == 6
    for name, (reserved, taken) in recoveries.items():
        assert taken <= reserved + SLACK_BYTES, name


def test_a_budget_gives_what_it_has_and_takes_it_back() -> None:
    budget = Budget(Limits(memory_bytes_max=100, session_bytes_max=60), NullObserver())
    budget.reserve(70, what="it", field="here")
    with pytest.raises(MemoryExhaustedError, match="31 bytes; 30 of 100 are free") as caught:
        budget.reserve(31, what="it", field="here")
    assert caught.value.field == "here"
    assert caught.value.retry_after_s is not None
    budget.reserve(30, what="it", field="here")
    assert budget.reserved_bytes == 100
    budget.release(30)
    budget.release(70)
    budget.reserve(100, what="it", field="here")
    budget.check_session(60, field="here")
    with pytest.raises(LimitExceededError):
        budget.check_session(61, field="here")


def test_the_weights_of_a_loss_are_reserved() -> None:
    weight = torch.ones(100_000)
    plain, weighted = (
        session_bytes(
            session_spec(spec(SGD(), loss=CrossEntropyLoss(weight=message)), Limits()),
            torch.device("cpu"),
        )
        for message in (None, message_of(weight))
    )
    assert weighted - plain == 2 * weight.nbytes
