"""Models, and loops that train them, for tests of steps that overlap with the backward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import optserve_client as optserve
from optserve_client.torch import RemoteOptimizer

WIDTH = 640  # Two of three layers fill three messages: enough for a piece of the answer.
SGD = optserve.optim.SGD(lr=0.1, fused=False)

Tamper: TypeAlias = Callable[[nn.Module], object]
Stepper: TypeAlias = RemoteOptimizer | torch.optim.Optimizer


def threads() -> list[str]:
    """Return the threads in which steps are under way."""
    return [thread.name for thread in threading.enumerate() if thread.name == "optserve-step"]


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))


def backward(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    model(torch.randn(4, WIDTH)).square().mean().backward()


def train(model: nn.Module, stepper: Stepper, seed: int, tamper: Tamper = lambda _: None) -> None:
    """Take a step as every loop does, and do something to the gradients before it."""
    stepper.zero_grad()
    backward(model, seed)
    tamper(model)
    stepper.step()


def remote(model: nn.Module, client: optserve.Client, **options: Any) -> RemoteOptimizer:  # noqa: ANN401
    options = {"optimizer": SGD, "overlap_backward": True, **options}
    return RemoteOptimizer(model.named_parameters(), client, **options)


def assert_same_bits(mine: nn.Module, expected: nn.Module) -> None:
    for ours, theirs in zip(mine.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Gate(torch.autograd.Function):
    """Passes everything on; on the way back it calls something first."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, call: Callable[[], object]) -> Tensor:  # noqa: ANN401
        ctx.call = call
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        ctx.call()
        return gradients[0], None


class Gated(nn.Module):
    """Layers, of which the first one gets its gradient only after a call."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self.layers = layers()
        self.call = call

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers[1:](Gate.apply(self.layers[0](inputs), self.call))  # type: ignore[no-untyped-call]
        return outputs
