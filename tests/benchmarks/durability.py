"""What durability costs: a step, many sessions at once, the way back, and bytes on the disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks import knobs
from benchmarks.arena import Contender, Contest, compete
from benchmarks.bulk import PARAMETERS
from benchmarks.conditions import Conditions
from benchmarks.figures import Comparison, Findings, Row, Spread, stated
from benchmarks.model import model_of
from benchmarks.peers.ours import data_directory
from benchmarks.training import (
    OptimizerName,
    Outcome,
    Reference,
    session_optimizer,
    step_session,
)
from server_process import ServerProcess, running_server

import optserve_client as optserve
from optserve_client import aio

SMALL = 10_000
ACTIVE = 64
OPTIMIZER: OptimizerName = "adam"

NONE = Contender(name="in memory only", peer="ours", options={"durability": "none"})
SNAPSHOT = Contender(name="snapshots", peer="ours", options={"durability": "snapshot"})
JOURNAL = Contender(name="journal", peer="ours", options={"durability": "journal"})
FSYNC = Contender(name="journal, fsync", peer="ours", options={"durability": "fsync"})
CONTENDERS = (NONE, SNAPSHOT, JOURNAL, FSYNC)

_STEPS_TOGETHER = 1_280  # Twenty for each session.
_REPLAYED_STEPS = 8
_RESTARTS = 3
_WRITTEN, _WRITTEN_STEPS = 2_500_000, 60


def durability(conditions: Conditions) -> Findings:
    """Compare durable sessions with one in memory only."""
    large = _contest("durability", "25 M", PARAMETERS, conditions)
    small = _contest("durability-small", "10 k", SMALL, conditions)
    rows = [
        stated(
            f"durability: {size}, {contender.name} / in memory only",
            "x",
            found.ratio(contender.name, NONE.name),
        )
        for size, found in (("25 M", large), ("10 k", small))
        for contender in CONTENDERS[1:]
    ]
    rows.append(_together(conditions))
    rows.append(_restart(conditions))
    rows.append(_amplification(conditions))
    return Findings(comparisons=(large, small), rows=tuple(rows))


def _contest(name: str, size: str, parameters: int, conditions: Conditions) -> Comparison:
    return compete(
        Contest(
            name=name,
            title=f"{size} parameters over loopback TCP, Adam, as durable as asked",
            parameters=parameters,
            optimizer=OPTIMIZER,
            contenders=CONTENDERS,
            threads=conditions.threads,
        ),
        conditions.effort,
        conditions.report,
    )


def _together(conditions: Conditions) -> Row:
    """Let 64 small sessions step at once: what one sync is shared by."""
    shares = []
    with data_directory() as folder:
        flags = ("--data-dir", folder, "--torch-threads", str(conditions.threads))
        with running_server(*flags, *knobs.server_flags("auto")) as server:
            for number in range(conditions.effort.rounds):
                conditions.report(f"durability: 64 sessions, round {number + 1}")
                rates = [
                    asyncio.run(_rate(server, options)) for options in (NONE.options, FSYNC.options)
                ]
                shares.append(100 * rates[1] / rates[0])
    return stated(
        f"durability: {ACTIVE} sessions of 10 k at once, journal with fsync, of the rate in memory",
        "%",
        Spread.of(shares),
    )


async def _rate(server: ServerProcess, options: Mapping[str, str]) -> float:
    model = model_of(SMALL)
    config = knobs.client_config("grpc")
    async with aio.connect(server.address, config=config, progress=False) as client:
        sessions = await asyncio.gather(
            *(
                client.create_session(
                    model.initial(),
                    optimizer=session_optimizer(OPTIMIZER),
                    durability=knobs.durability(options),
                )
                for _ in range(ACTIVE)
            )
        )
        gradients = model.gradient_sets()[0]
        await asyncio.gather(*(session.step(gradients) for session in sessions))
        start = time.perf_counter()

        async def work(session: aio.Session) -> None:
            for _ in range(_STEPS_TOGETHER // ACTIVE):
                await session.step(gradients)

        await asyncio.gather(*(work(session) for session in sessions))
        rate = _STEPS_TOGETHER / (time.perf_counter() - start)
        await asyncio.gather(*(session.delete() for session in sessions))
    return rate


def _restart(conditions: Conditions) -> Row:
    """Kill the server behind a few large steps, and see how long the session is away."""
    model, ratios, told = model_of(PARAMETERS), [], ""
    for number in range(_RESTARTS if conditions.thorough else 1):
        conditions.report(f"durability: restart {number + 1}")
        with data_directory() as folder:
            flags = ("--data-dir", folder, "--torch-threads", str(conditions.threads))
            with running_server(*flags) as server, _connected(server) as client:
                session = client.create_session(
                    model.initial(),
                    optimizer=session_optimizer(OPTIMIZER),
                    durability=knobs.durability(JOURNAL.options),
                )
                start = time.perf_counter()
                step_session(session, model, _REPLAYED_STEPS)
                took_s = time.perf_counter() - start
                server.process.kill()
                server.process.wait()
            with running_server(*flags) as server, _connected(server) as client:
                start = time.perf_counter()
                back = client.join_session(session.session_id)  # Which brings it back from disk.
                back_s = time.perf_counter() - start
                parameters = back.download()
                Reference(model, OPTIMIZER, _REPLAYED_STEPS).check(
                    parameters, Outcome(), "the session that came back"
                )
        ratios.append(back_s / took_s)
        told = f"{back_s:.2f} s in the last run, a snapshot of {model.tensor_bytes >> 20} MiB"
    return stated(
        f"durability: time away after kill -9 / {_REPLAYED_STEPS} steps since the snapshot",
        "x",
        Spread.of(ratios),
        note=f"{told} and its journal; the server itself starts as without",
    )


def _amplification(conditions: Conditions) -> Row:
    """See how many bytes go to the disk for each byte of gradients, snapshots included."""
    conditions.report("durability: bytes written")
    model = model_of(_WRITTEN)
    with data_directory() as folder:
        flags = ("--data-dir", folder, "--torch-threads", str(conditions.threads))
        with (
            running_server(*flags) as server,
            _connected(server) as client,
            client.create_session(
                model.initial(),
                optimizer=session_optimizer(OPTIMIZER),
                durability=knobs.durability(JOURNAL.options),
            ) as session,
        ):
            before = _written_bytes(server)
            step_session(session, model, _WRITTEN_STEPS)
            written = _written_bytes(server) - before
    gradients = _WRITTEN_STEPS * model.tensor_bytes
    return stated(
        "durability: bytes written / bytes of gradients, journal",
        "x",
        Spread.of([written / gradients]),
        note=f"{_WRITTEN_STEPS} steps of {model.tensor_bytes >> 20} MiB with Adam, with the"
        " snapshots that keep the journal short",
    )


def _connected(server: ServerProcess) -> optserve.Client:
    return optserve.connect(server.address, config=knobs.client_config("grpc"), progress=False)


def _written_bytes(server: ServerProcess) -> int:
    """Return what the process has had written to disks: proc(5), io."""
    lines = Path(f"/proc/{server.process.pid}/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["write_bytes"])
