"""Small models: what a step costs when there is nothing to carry."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.arena import Contender, Contest, compete
from benchmarks.bulk import BARE_STREAM, RPC_SAME_HOST, RPC_TCP
from benchmarks.conditions import Conditions
from benchmarks.figures import Findings, at_most, row
from benchmarks.training import Outcome

PARAMETERS = 1_000
STEPS = 200  # In a round: a step takes about a millisecond.
WARMUP_STEPS = 50

PING_PONG_UNARY = Contender(
    name="grpc.aio ping-pong, unary",
    peer="ping_pong",
    options={"call": "unary"},
    outcome=Outcome(trained=False),
)
OURS = Contender(name="optserve, asyncio", peer="ours_asyncio")
OURS_BLOCKING = Contender(name="optserve, blocking", peer="ours")


def small(conditions: Conditions) -> Findings:
    """Compare a step of a tiny model with a message there and back."""
    contenders = [BARE_STREAM, PING_PONG_UNARY, OURS]
    if conditions.thorough:
        contenders += [OURS_BLOCKING, RPC_TCP, RPC_SAME_HOST]
    found = compete(
        Contest(
            name="small",
            title="1 k parameters over loopback TCP, SGD with momentum",
            parameters=PARAMETERS,
            optimizer="sgd-momentum",
            contenders=contenders,
            threads=conditions.threads,
        ),
        replace(conditions.effort, steps=STEPS, warmup_steps=WARMUP_STEPS),
        conditions.report,
    )
    return Findings(
        comparisons=(found,),
        rows=(
            row(
                "1 k parameters: round trip / bare call",
                at_most(1.5),
                lambda: found.ratio(OURS.name, PING_PONG_UNARY.name),
            ),
            row(
                "1 k parameters: round trip / bare message on a stream",
                at_most(1.5),
                lambda: found.ratio(OURS.name, BARE_STREAM.name),
            ),
        ),
    )
