"""What a run must come to: the optimizers, and the same steps taken by torch alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from benchmarks.model import Array, Model, Tensors
from torch import Tensor

import optserve_client as optserve
from optserve_client.optim import AnyOptimizer

WireType: TypeAlias = Literal["FP32", "BF16", "FP16", "INT8_BLOCKS"]
"""How tensors of one direction are written on the wire."""

OptimizerName: TypeAlias = Literal["sgd-momentum", "adam"]

_SGD_LR, _SGD_MOMENTUM = 0.01, 0.9
_ADAM_LR = 0.01  # A tenth of it would be lost in 8 bits for quite some steps.

# How far a parameter that travelled may be from the one that was sent, relative to it: half a unit
# in the last place of 8 and of 11 bits of significand; and 1/254 of the largest in its block, which
# among normally distributed numbers is below a hundredth of their norm.
_ROUNDING: dict[WireType, float] = {
    "FP32": 0.0,
    "BF16": 2.0**-8,
    "FP16": 2.0**-11,
    "INT8_BLOCKS": 0.01,
}
# How far the way that a tensor has gone may be from torch's, relative to it, if gradients had 8
# bits: what is rounded away comes with the next step, but Adam does not add up what it gets.
_INT8_WAY = 0.25
# As in tests/gpu: some hundred units in the last place.
_CUDA_RELATIVE, _CUDA_ABSOLUTE = 1e-5, 1e-6


class WrongParametersError(Exception):
    """A contender has come to other parameters than it must; its times mean nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the parameters must be at the end of a run."""

    trained: bool = True
    """Whether they were stepped; else bytes were only moved, and they must be the initial ones."""
    gradients: WireType = "FP32"
    parameters: WireType = "FP32"
    device: Literal["cpu", "cuda"] = "cpu"
    """Where they were stepped. torch's kernels for CUDA may round in another way than here."""

    def told(self) -> str:
        """Say how exactly the parameters were compared."""
        if not self.trained:
            return "the bytes that were sent"
        if self.device == "cuda":
            return "torch.optim's on the CPU, within some hundred units in the last place"
        if self.gradients == self.parameters == "FP32":
            return "torch.optim's, bit for bit"
        return "torch.optim's, within the bound of the data types on the wire"


def torch_optimizer(name: OptimizerName, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Return the fused optimizer over ``parameters``."""
    match name:
        case "sgd-momentum":
            return torch.optim.SGD(parameters, lr=_SGD_LR, momentum=_SGD_MOMENTUM, fused=True)
        case "adam":
            return torch.optim.Adam(parameters, lr=_ADAM_LR, fused=True)


def session_optimizer(name: OptimizerName) -> AnyOptimizer:
    """Return the same optimizer, as a session has it: fused by its own default."""
    match name:
        case "sgd-momentum":
            return optserve.optim.SGD(lr=_SGD_LR, momentum=_SGD_MOMENTUM)
        case "adam":
            return optserve.optim.Adam(lr=_ADAM_LR)


def state_tensors(name: OptimizerName) -> int:
    """Return how many tensors of its own size the optimizer keeps for a parameter."""
    return {"sgd-momentum": 1, "adam": 2}[name]


def step_session(session: optserve.Session, model: Model, steps: int) -> None:
    """Take the first ``steps`` steps of a session, with the model's sets of gradients in turn."""
    gradient_sets = model.gradient_sets()
    for number in range(steps):
        session.step(gradient_sets[number % len(gradient_sets)])


class Reference:
    """The same model, trained here by torch alone."""

    def __init__(self, model: Model, optimizer: OptimizerName, steps: int) -> None:
        """Be what ``model`` is after so many steps."""
        self._model = model
        self._optimizer = optimizer
        self._steps = steps
        self._known: dict[WireType, dict[str, Array]] = {}

    def check(self, parameters: Tensors, outcome: Outcome, contender: str) -> None:
        """Compare what a contender has come to with what it must have come to.

        Raises:
            WrongParametersError: They differ by more than ``outcome`` allows.
        """
        initial = self._model.initial()
        expected: Tensors = initial
        if outcome.trained:
            # What the server did not get in full it cannot step with: the rounding of gradients to
            # 16 bits is exact to repeat here; that of a block to 8 bits is bounded below.
            rounding = "FP32" if outcome.gradients == "INT8_BLOCKS" else outcome.gradients
            expected = self._trained(rounding)
        for name, wanted in expected.items():
            came = parameters[name]
            if came.shape != wanted.shape or not _agree(came, wanted, initial[name], outcome):
                off = float(np.abs(came - wanted).max()) if came.shape == wanted.shape else np.nan
                raise WrongParametersError(
                    f"{contender}: after {self._steps} steps '{name}' must be {outcome.told()};"
                    f" it is off by {off:g}"
                )

    def _trained(self, rounding: WireType) -> dict[str, Array]:
        if rounding not in self._known:
            rounded = [
                {name: _rounded(torch.from_numpy(value), rounding) for name, value in each.items()}
                for each in self._model.gradient_sets()
            ]
            tensors = {k: torch.from_numpy(v) for k, v in self._model.initial().items()}
            train(tensors, rounded, self._optimizer, self._steps)
            self._known[rounding] = {name: tensor.numpy() for name, tensor in tensors.items()}
        return self._known[rounding]


def train(
    parameters: Mapping[str, Tensor],
    gradient_sets: Sequence[Mapping[str, Tensor]],
    optimizer: OptimizerName,
    steps: int,
) -> None:
    """Step ``parameters`` in place, with the sets in turn."""
    update = torch_optimizer(optimizer, list(parameters.values()))
    for step in range(steps):
        for name, parameter in parameters.items():
            parameter.grad = gradient_sets[step % len(gradient_sets)][name]
        update.step()
    for parameter in parameters.values():
        parameter.grad = None


def _rounded(tensor: Tensor, wire: WireType) -> Tensor:
    types = {"BF16": torch.bfloat16, "FP16": torch.float16}
    return tensor.to(types[wire]).to(torch.float32) if wire in types else tensor


def _agree(came: Array, wanted: Array, initial: Array, outcome: Outcome) -> bool:
    rounding = _ROUNDING[outcome.parameters]
    if outcome.device == "cuda":
        return bool(np.allclose(came, wanted, rtol=_CUDA_RELATIVE, atol=_CUDA_ABSOLUTE))
    if "INT8_BLOCKS" in (outcome.gradients, outcome.parameters):
        way = _INT8_WAY * _norm(wanted - initial) if outcome.gradients == "INT8_BLOCKS" else 0.0
        return _norm(came - wanted) <= rounding * _norm(wanted) + way
    if rounding:
        bound = rounding * np.abs(wanted) + np.finfo(np.float16).smallest_subnormal
        return bool(np.all(np.abs(came - wanted) <= bound))
    return came.tobytes() == wanted.tobytes()


def _norm(tensor: Array) -> float:
    return float(np.linalg.norm(tensor))
