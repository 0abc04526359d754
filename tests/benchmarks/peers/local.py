"""The floor of the optimizer: ``torch.optim``, fused, in the process that has the gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from benchmarks.job import BlockingPeer, Job
from benchmarks.model import Tensors
from benchmarks.training import torch_optimizer


@contextmanager
def connect(job: Job) -> Iterator[LocalPeer]:
    """Be ready for the first step."""
    yield LocalPeer(job)


class LocalPeer(BlockingPeer):
    """A model and its optimizer."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._parameters = {
            name: torch.from_numpy(value.copy()) for name, value in self.values.items()
        }
        self._optimizer = torch_optimizer(job.optimizer, list(self._parameters.values()))
        self.values = {name: tensor.numpy() for name, tensor in self._parameters.items()}

    def prepare(self, gradients: Tensors) -> None:
        for name, parameter in self._parameters.items():
            parameter.grad = torch.from_numpy(gradients[name])

    def step(self) -> None:
        self._optimizer.step()
