"""On a CUDA device: what a step through the server costs beyond the copies and the update."""

from __future__ import annotations

import torch
from benchmarks.arena import Contender, Contest, compete
from benchmarks.bulk import PARAMETERS
from benchmarks.conditions import Conditions
from benchmarks.figures import Findings, stated
from benchmarks.job import SkippedError
from benchmarks.training import Outcome

_OUTCOME = Outcome(device="cuda")
LOCAL = Contender(name="H2D + fused step + D2H", peer="local_cuda", outcome=_OUTCOME)
OURS = Contender(name="optserve", peer="ours", options={"device": "cuda"}, outcome=_OUTCOME)
OURS_SHM = Contender(
    name="optserve, shared memory",
    peer="ours",
    options={"device": "cuda", "lane": "shm"},
    outcome=_OUTCOME,
)
ROWS = {
    "CUDA: step / H2D + fused step + D2H": OURS,
    "CUDA, shared memory: step / H2D + fused step + D2H": OURS_SHM,
}
"""What is stated, of which contender."""


def cuda(conditions: Conditions) -> Findings:
    """Compare a step of a session on the device with the same copies and update alone.

    Raises:
        SkippedError: There is no device.
    """
    if not torch.cuda.is_available():
        raise SkippedError("there is no CUDA device")
    contest = Contest(
        name="cuda",
        title="25 M parameters on a CUDA device, Adam",
        parameters=PARAMETERS,
        optimizer="adam",
        contenders=[LOCAL, OURS, OURS_SHM],
        threads=conditions.threads,
    )
    found = compete(contest, conditions.effort, conditions.report)
    rows = [
        stated(name, "x", found.ratio(contender.name, LOCAL.name))
        for name, contender in ROWS.items()
    ]
    return Findings(comparisons=(found,), rows=tuple(rows))
