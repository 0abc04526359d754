"""How much memory the server takes for one large session at its work."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import knobs
from benchmarks.bulk import PARAMETERS
from benchmarks.conditions import Conditions
from benchmarks.figures import Findings, Spread, at_most, row
from benchmarks.model import Model, model_of
from benchmarks.training import (
    OptimizerName,
    Outcome,
    Reference,
    session_optimizer,
    state_tensors,
    step_session,
)
from server_process import ServerProcess, running_server

import optserve_client as optserve

OPTIMIZER: OptimizerName = "adam"
STEPS = 6
RUNS = 3  # Each with a server of its own. They differ little: for a check, one will do.

# Before the baseline: what torch, gRPC and the allocator take once and for all, they have then.
_WARMING = 1_000_000
_SETTLE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Peaks:
    """Most memory that the server has held beyond what it holds when idle, in bytes."""

    created: int
    """From the session's creation to the end of the upload of its parameters."""
    at_work: int
    """While it stepped."""


def memory(conditions: Conditions) -> Findings:
    """Compare the server's peak with the session's parameters, state and one gradient."""
    peaks = []
    for number in range(RUNS if conditions.thorough else 1):
        conditions.report(f"memory: run {number + 1}")
        peaks.append(_peaks("auto", conditions))
    needed = (1 + state_tensors(OPTIMIZER) + 1) * model_of(PARAMETERS).tensor_bytes
    creating = Spread.of([peak.created / needed for peak in peaks]).median
    note = f"of {needed >> 20} MiB; while it was created, {creating:.2f} x"
    overlapped = _peaks("on", conditions).at_work
    note += f"; overlapped, {overlapped / needed:.2f} x"
    return Findings(
        rows=(
            row(
                "memory: peak / (parameters + state + one gradient)",
                at_most(1.3),
                lambda: Spread.of([peak.at_work / needed for peak in peaks]),
                note=note,
            ),
        )
    )


def _peaks(overlap: str, conditions: Conditions) -> _Peaks:
    model = model_of(PARAMETERS)
    flags = ("--torch-threads", str(conditions.threads), *knobs.server_flags(overlap))
    config = knobs.client_config("grpc")
    with (
        running_server(*flags) as server,
        optserve.connect(server.address, config=config, progress=False) as client,
    ):
        _train(client, model_of(_WARMING))
        time.sleep(_SETTLE_S)
        idle = server.resident_bytes()
        _forget_peak(server)
        with client.create_session(
            model.initial(), optimizer=session_optimizer(OPTIMIZER)
        ) as session:
            created = server.peak_bytes() - idle
            _forget_peak(server)
            step_session(session, model, STEPS)
            at_work = server.peak_bytes() - idle
            Reference(model, OPTIMIZER, STEPS).check(session.parameters, Outcome(), "optserve")
    return _Peaks(created=created, at_work=at_work)


def _train(client: optserve.Client, model: Model) -> None:
    with client.create_session(model.initial(), optimizer=session_optimizer(OPTIMIZER)) as session:
        step_session(session, model, STEPS)


def _forget_peak(server: ServerProcess) -> None:
    """Let the kernel count the peak from what the process holds now: proc(5), clear_refs."""
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5", encoding="ascii")
