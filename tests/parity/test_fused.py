"""Where the server uses torch's fused update, it is right: as near to float64 as the plain one."""

from __future__ import annotations

import pytest
import torch
from drivers import Driver
from parity.cases import OPTIMIZERS, OptimizerCase
from parity.trajectories import local, spec_of
from torch import Tensor

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
FUSIBLE = [
    case
    for case in OPTIMIZERS
    if case.kind in ("SGD", "Adam", "AdamW", "Adagrad")
    and not {"fused", "foreach"} & set(case.hyperparameters)
]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", FUSIBLE, ids=[case.name for case in FUSIBLE])
def test_fused_is_no_further_from_float64_than_unfused(
    core_driver: Driver, case: OptimizerCase, dtype: torch.dtype
) -> None:
    group = core_driver.create(spec_of(case, None, 1, dtype)).spec.groups[0]
    in_force = getattr(group.overrides, str(group.overrides.WhichOneof("kind")))
    if not in_force.fused:
        assert (case.kind, dtype.itemsize) == ("SGD", 2), "only there torch's fused update is wrong"
        return
    given = dict(case.hyperparameters)
    if dtype is torch.float16 and case.kind != "SGD":
        given["eps"] = 1e-3  # torch's default is zero in FP16.
    exact = _last(case, {**given, "fused": False}, torch.float64)
    fused = _distance(exact, _last(case, {**given, "fused": True}, dtype))
    plain = _distance(exact, _last(case, {**given, "fused": False}, dtype))
    # Each rounds in its own way; what is wrong would be off by a share of a step, not of its error.
    assert fused <= 2 * plain + 64 * torch.finfo(torch.float64).eps


def _last(case: OptimizerCase, given: dict[str, object], dtype: torch.dtype) -> Tensor:
    parameters = local(case, None, {"default": given}, dtype).parameters[-1]
    return torch.cat([parameter.flatten().double() for parameter in parameters.values()])


def _distance(exact: Tensor, tensor: Tensor) -> float:
    return (exact - tensor).abs().max().item()
