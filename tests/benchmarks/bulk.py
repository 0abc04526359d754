"""Large models: against the peers on loopback, through shared memory, and as they grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from benchmarks.arena import Contender, Contest, compete
from benchmarks.conditions import Conditions
from benchmarks.figures import Findings, Spread, at_least, at_most, row
from benchmarks.training import Outcome

PARAMETERS = 25_557_032  # "25 M": the ResNet-50 itself.
SIZES = (1_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
SIZE_CROWDED = 50_000_000  # Above it the peers that hold many copies would not fit beside others.
LINE_SIZES = (1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000)

LEVEL = 1.05  # "Level with or ahead": what differs by a twentieth is level.

LOCAL = Contender(name="local torch.optim", peer="local")
RAW = Contender(
    name="raw sockets",
    peer="raw_sockets",
    options={"flow": "duplex"},
    outcome=Outcome(trained=False),
)
RAW_IN_TURN = Contender(
    name="raw sockets, in turn",
    peer="raw_sockets",
    options={"flow": "in-turn"},
    outcome=Outcome(trained=False),
)
BARE_STREAM = Contender(
    name="bare grpc.aio stream",
    peer="ping_pong",
    options={"call": "stream"},
    outcome=Outcome(trained=False),
)
RPC_TCP = Contender(name="torch RPC, TCP", peer="torch_rpc", options={"channels": "tcp"})
RPC_SAME_HOST = Contender(
    name="torch RPC, same host", peer="torch_rpc", options={"channels": "same-host"}
)
RAY = Contender(name="Ray actor", peer="ray_actor")
NAIVE = Contender(name="gRPC unary + torch.save", peer="naive_grpc")
OURS = Contender(name="optserve", peer="ours")
OURS_BF16 = Contender(
    name="optserve, BF16 both ways",
    peer="ours",
    options={"gradients": "BF16", "parameters": "BF16"},
    outcome=Outcome(gradients="BF16", parameters="BF16"),
)
OURS_INT8 = Contender(
    name="optserve, INT8 up, BF16 down",
    peer="ours",
    options={"gradients": "INT8_BLOCKS", "parameters": "BF16"},
    outcome=Outcome(gradients="INT8_BLOCKS", parameters="BF16"),
)
OURS_SHM = Contender(name="optserve, shared memory", peer="ours", options={"lane": "shm"})


def loopback(conditions: Conditions) -> Findings:
    """Compare a step over loopback TCP with the peers'."""
    contenders = [LOCAL, RAW, BARE_STREAM, OURS, OURS_BF16, RPC_TCP, RAY, NAIVE]
    if conditions.thorough:
        contenders += [RAW_IN_TURN, OURS_INT8]
    found = compete(
        Contest(
            name="loopback",
            title="25 M parameters over loopback TCP, SGD with momentum",
            parameters=PARAMETERS,
            optimizer="sgd-momentum",
            contenders=contenders,
            threads=conditions.threads,
        ),
        conditions.effort,
        conditions.report,
    )
    return Findings(
        comparisons=(found,),
        rows=(
            row(
                "loopback: step / raw sockets",
                at_most(1.7),
                lambda: found.ratio(OURS.name, RAW.name),
            ),
            row(
                "loopback: unary + torch.save / step",
                at_least(8),
                lambda: found.ratio(NAIVE.name, OURS.name),
            ),
            row(
                "loopback: step / Ray actor",
                at_most(LEVEL),
                lambda: found.ratio(OURS.name, RAY.name),
            ),
            row(
                "loopback: BF16 step / torch RPC FP32",
                at_most(LEVEL),
                lambda: found.ratio(OURS_BF16.name, RPC_TCP.name),
            ),
        ),
    )


def shared_memory(conditions: Conditions) -> Findings:
    """Compare a step through shared memory with a local one, and with torch RPC's fast channels."""
    found = compete(
        Contest(
            name="shared-memory",
            title="25 M parameters on one host, Adam",
            parameters=PARAMETERS,
            optimizer="adam",
            contenders=[LOCAL, OURS_SHM, RPC_SAME_HOST],
            threads=conditions.threads,
        ),
        conditions.effort,
        conditions.report,
    )
    return Findings(
        comparisons=(found,),
        rows=(
            row(
                "shared memory: step / local step",
                at_most(1.3),
                lambda: found.ratio(OURS_SHM.name, LOCAL.name),
            ),
            row(
                "shared memory: torch RPC same host / step",
                at_least(2.5),
                lambda: found.ratio(RPC_SAME_HOST.name, OURS_SHM.name),
            ),
        ),
    )


def sizes(conditions: Conditions) -> Findings:
    """Compare a step with the peers' from a thousand to a hundred million parameters."""
    found = []
    for parameters in SIZES:
        contenders = [LOCAL, RAW, OURS, OURS_SHM, RPC_TCP, RPC_SAME_HOST]
        if parameters < SIZE_CROWDED:
            contenders += [RAY, NAIVE]
        contest = Contest(
            name=f"size-{parameters}",
            title=f"{_told(parameters)} parameters over loopback, SGD with momentum",
            parameters=parameters,
            optimizer="sgd-momentum",
            contenders=contenders,
            threads=conditions.threads,
        )
        found.append(compete(contest, conditions.effort, conditions.report))
    return Findings(comparisons=tuple(found))


def growth(conditions: Conditions) -> Findings:
    """See how far the time of a step is from a line through five sizes."""
    contenders = [
        Contender(name=f"optserve, {_told(size)}", peer="ours", parameters=size)
        for size in LINE_SIZES
    ]
    found = compete(
        Contest(
            name="growth",
            title="1 M to 100 M parameters over loopback TCP, SGD with momentum",
            parameters=LINE_SIZES[-1],
            optimizer="sgd-momentum",
            contenders=contenders,
            threads=conditions.threads,
        ),
        conditions.effort,
        conditions.report,
    )
    timings = [found.timing(contender.name) for contender in contenders]
    fit = straight_line(
        [timing.parameters for timing in timings], [timing.step_s.median for timing in timings]
    )
    worst = 100 * max(abs(each) for each in fit.deviations)
    off = ", ".join(f"{100 * each:+.0f} %" for each in fit.deviations)
    return Findings(
        comparisons=(found,),
        rows=(
            row(
                "growth: largest distance from a line",
                at_most(15, "%"),
                lambda: Spread.of([worst]),
                note=f"{1e3 * fit.base_s:.1f} ms + {1e9 * fit.each_s:.2f} ms per million"
                f" parameters; off by {off}",
            ),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A time that grows with the number of parameters."""

    base_s: float
    """Of no parameters."""
    each_s: float
    """Of one more parameter."""
    deviations: tuple[float, ...]
    """How far each measured time is from the line, relative to the line."""


def straight_line(parameters: Sequence[int], times_s: Sequence[float]) -> Line:
    """Return the line whose *relative* distances from the times have the least squares.

    Not the absolute ones: to those only the largest model would count, and the small ones could be
    off by a multiple without being seen.
    """
    counts, times = np.asarray(parameters, dtype=float), np.asarray(times_s)
    terms = np.stack([np.ones_like(counts), counts], axis=1) / times[:, None]
    (base_s, each_s), *_ = np.linalg.lstsq(terms, np.ones_like(times), rcond=None)
    on_line = base_s + each_s * counts
    return Line(
        base_s=float(base_s),
        each_s=float(each_s),
        deviations=tuple((times / on_line - 1).tolist()),
    )


def _told(parameters: int) -> str:
    millions = parameters / 1_000_000
    return f"{millions:g} M" if millions >= 1 else f"{parameters / 1_000:g} k"
