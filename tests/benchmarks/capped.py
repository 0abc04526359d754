"""Large models over a network that is slower than the machines at its ends."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.arena import Contender, Contest, compete
from benchmarks.bulk import OURS, OURS_BF16, OURS_INT8, PARAMETERS, RPC_TCP
from benchmarks.conditions import Conditions
from benchmarks.figures import Comparison, Findings, Row, at_least, at_most, row
from benchmarks.job import SkippedError
from benchmarks.link import Link, capped_link
from benchmarks.model import model_of
from benchmarks.training import Outcome

BITS_PER_S = 2e9
OURS_IN_TURN = Contender(name="optserve, not overlapped", peer="ours", options={"overlap": "off"})
RAW = {
    flow: Contender(
        name=f"raw sockets, {told}",
        peer="raw_sockets",
        options={"flow": flow},
        outcome=Outcome(trained=False),
    )
    for flow, told in {
        "duplex": "both ways at once",
        "upload": "upload only",
        "download": "download only",
    }.items()
}

# Raw sockets in one direction must take the time that the nominal rate says, or up to a tenth more:
# for headers of packets, 4 % of small ones, and for the filter. If they are faster, nothing is
# capped; if they are much slower, it is the machine that is measured, and not the link.
CAP_HOLDS = (0.98, 1.10)

_STEP = "capped link: step / one direction at line rate"
_STEP_BF16 = "capped link: BF16 step / FP32 at line rate"
_RPC = "capped link: torch RPC / step"
_TARGETS = {_STEP: at_most(1.15), _STEP_BF16: at_most(0.62), _RPC: at_least(1.6)}


def capped(conditions: Conditions) -> Findings:
    """Compare a step at 2 Gbit/s with what the link allows, and with torch RPC."""
    try:
        with capped_link(BITS_PER_S) as link:
            return _measured(conditions, link)
    except SkippedError as reason:
        return Findings(rows=_skipped(str(reason)))


def _measured(conditions: Conditions, link: Link) -> Findings:
    interfaces = {
        "server_interface": link.server_interface,
        "client_interface": link.client_interface,
    }
    rpc = replace(RPC_TCP, options={**RPC_TCP.options, **interfaces})
    contenders = [*RAW.values(), OURS, OURS_BF16, rpc]
    if conditions.thorough:
        contenders += [OURS_IN_TURN, OURS_INT8]
    found = compete(
        Contest(
            name="capped",
            title="25 M parameters over a link of 2 Gbit/s, Adam",
            parameters=PARAMETERS,
            optimizer="adam",
            contenders=contenders,
            threads=conditions.threads,
            place=link.place,
        ),
        conditions.effort,
        conditions.report,
    )
    line_s = link.seconds_for(model_of(PARAMETERS).tensor_bytes)
    problem = _cap_problem(found, line_s)
    if problem:
        return Findings(comparisons=(found,), rows=_skipped(problem))

    note = f"one direction takes {1e3 * line_s:.0f} ms at the nominal rate"
    return Findings(
        comparisons=(found,),
        rows=(
            row(_STEP, _TARGETS[_STEP], lambda: found.relative_to(OURS.name, line_s), note),
            row(
                _STEP_BF16, _TARGETS[_STEP_BF16], lambda: found.relative_to(OURS_BF16.name, line_s)
            ),
            row(_RPC, _TARGETS[_RPC], lambda: found.ratio(rpc.name, OURS.name)),
        ),
    )


def _cap_problem(found: Comparison, line_s: float) -> str:
    """Say what is wrong if the link is not what it should be."""
    low, high = CAP_HOLDS
    for flow in ("upload", "download"):
        relative = found.relative_to(RAW[flow].name, line_s).median
        if not low <= relative <= high:
            return f"raw {flow} took {relative:.2f} x the time of the nominal rate: no such link"
    return ""


def _skipped(reason: str) -> tuple[Row, ...]:
    return tuple(
        Row(name=name, unit=target.unit, target=target, skipped=reason)
        for name, target in _TARGETS.items()
    )
