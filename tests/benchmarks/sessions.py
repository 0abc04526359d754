"""Many sessions: how much of one session's rate they reach together, and what an idle one costs."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks import knobs
from benchmarks.conditions import Conditions
from benchmarks.figures import Findings, Spread, at_least, at_most, row
from benchmarks.model import Model, Tensors, model_of
from benchmarks.training import (
    OptimizerName,
    Outcome,
    Reference,
    session_optimizer,
    state_tensors,
)
from server_process import ServerProcess, running_server

from optserve_client import aio

SESSIONS = 1_000
ACTIVE = 64
PARAMETERS = 10_000
OPTIMIZER: OptimizerName = "adam"

_FIRST_SESSIONS = 100  # What the first ones cost is in part what the server grows once and for all.
_CREATED_AT_ONCE = 16
_STEPS_ALONE = 300
_STEPS_TOGETHER = 2_000  # Two for each session.
_SETTLE_S = 1.0


@dataclass(slots=True, kw_only=True)
class _Session:
    """A session, and how often it has stepped."""

    session: aio.Session
    gradient_sets: Sequence[Tensors]
    steps: int = field(default=0, init=False)

    async def step(self) -> None:
        await self.session.step(self.gradient_sets[self.steps % len(self.gradient_sets)])
        self.steps += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    shares: Sequence[float]
    """Of the rate of one session alone, that all reach together; for each round."""
    rates: Sequence[float]
    """Of all together, in steps a second; for each round."""
    bytes_each: float
    """That the server holds for each idle session, for which nobody has a call open."""
    stream_bytes: float
    """More, while its worker has its stream open."""


def sessions(conditions: Conditions) -> Findings:
    """Open a thousand sessions and let 64 of them step at a time."""
    flags = ("--sessions-max", str(SESSIONS + 1), "--torch-threads", str(conditions.threads))
    with running_server(*flags, *knobs.server_flags("auto")) as server:
        found = asyncio.run(_measure(server, conditions))
    state_bytes = (1 + state_tensors(OPTIMIZER)) * model_of(PARAMETERS).tensor_bytes
    beyond_kib = (found.bytes_each - state_bytes) / 1024
    stream_kib = found.stream_bytes / 1024
    rate = Spread.of(found.rates).median
    return Findings(
        rows=(
            row(
                "1,000 sessions, 64 active: rate / one alone",
                at_least(70, "%"),
                lambda: Spread.of([100 * share for share in found.shares]),
                note=f"{rate:.0f} steps a second together",
            ),
            row(
                "1,000 sessions: memory of an idle one beyond its state",
                at_most(64, "KiB"),
                lambda: Spread.of([beyond_kib]),
                note=f"its state is {state_bytes / 1024:.0f} KiB; an open stream takes"
                f" {stream_kib:.0f} KiB more, gradients included",
            ),
        )
    )


async def _measure(server: ServerProcess, conditions: Conditions) -> _Measured:
    model = model_of(PARAMETERS)
    config = knobs.client_config("grpc")
    async with aio.connect(server.address, config=config, progress=False) as client:
        conditions.report(f"sessions: creating {SESSIONS}")
        alone = (await _created(client, model, 1))[0]
        first = await _created(client, model, _FIRST_SESSIONS)
        before = await _resident_bytes(server)
        left = await _left(client, model, SESSIONS - _FIRST_SESSIONS)
        idle = await _resident_bytes(server)
        others = await _joined(client, model, left)
        open_ = await _resident_bytes(server)
        shares, rates = [], []
        for number in range(conditions.effort.rounds):
            conditions.report(f"sessions: round {number + 1} of {conditions.effort.rounds}")
            alone_rate = await _rate([alone], active=1, steps=_STEPS_ALONE)
            rate = await _rate([*first, *others], active=ACTIVE, steps=_STEPS_TOGETHER)
            shares.append(rate / alone_rate)
            rates.append(rate)
        conditions.report("sessions: checking the parameters")
        _check(model, [alone, *first, *others])
    return _Measured(
        shares=shares,
        rates=rates,
        bytes_each=(idle - before) / len(others),
        stream_bytes=(open_ - idle) / len(others),
    )


async def _created(client: aio.Client, model: Model, count: int) -> list[_Session]:
    """Create sessions that have taken a step: their state is there, their stream is open."""
    initial, gradient_sets = model.initial(), model.gradient_sets()
    turn = asyncio.Semaphore(_CREATED_AT_ONCE)

    async def create() -> _Session:
        async with turn:
            made = await client.create_session(initial, optimizer=session_optimizer(OPTIMIZER))
            session = _Session(session=made, gradient_sets=gradient_sets)
            await session.step()
        return session

    return list(await asyncio.gather(*(create() for _ in range(count))))


async def _left(client: aio.Client, model: Model, count: int) -> list[str]:
    """Create sessions that have taken a step, and leave them; return their ids."""
    session_ids: list[str] = []
    while len(session_ids) < count:
        # A few at a time, or what their open streams took would count, too: the server keeps
        # memory that was used once.
        created = await _created(client, model, min(_CREATED_AT_ONCE, count - len(session_ids)))
        for each in created:
            await each.session.close()
            session_ids.append(each.session.session_id)
    return session_ids


async def _joined(client: aio.Client, model: Model, session_ids: Sequence[str]) -> list[_Session]:
    """Go on in sessions that have taken a step: their streams are open again."""
    gradient_sets = model.gradient_sets()
    joined = []
    for session_id in session_ids:
        session = _Session(
            session=await client.join_session(session_id), gradient_sets=gradient_sets
        )
        session.steps = 1
        await session.step()
        joined.append(session)
    return joined


async def _rate(idle: Sequence[_Session], *, active: int, steps: int) -> float:
    """Let so many sessions step at a time, all of them in turn; return steps a second."""
    waiting, left = deque(idle), steps

    async def work() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            session = waiting.popleft()
            await session.step()
            waiting.append(session)

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(active)))
    return steps / (time.perf_counter() - start)


async def _resident_bytes(server: ServerProcess) -> int:
    await asyncio.sleep(_SETTLE_S)
    return server.resident_bytes()


def _check(model: Model, stepped: Sequence[_Session]) -> None:
    references: dict[int, Reference] = {}
    for each in stepped:
        if each.steps not in references:
            references[each.steps] = Reference(model, OPTIMIZER, each.steps)
        session = each.session
        references[each.steps].check(session.parameters, Outcome(), session.session_id)
