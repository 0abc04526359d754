"""The floor on a CUDA device: gradients to it, a fused step there, parameters back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from benchmarks.job import BlockingPeer, Job
from benchmarks.model import Tensors
from benchmarks.training import torch_optimizer


@contextmanager
def connect(job: Job) -> Iterator[LocalCudaPeer]:
    """Be ready for the first step."""
    yield LocalCudaPeer(job)


class LocalCudaPeer(BlockingPeer):
    """A model on the device, and pinned memory on the host: copies run as fast as they can."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        initial = {name: torch.from_numpy(value) for name, value in self.values.items()}
        self._parameters = {name: tensor.cuda() for name, tensor in initial.items()}
        self._gradients = {name: tensor.clone().pin_memory() for name, tensor in initial.items()}
        self._results = {name: tensor.clone().pin_memory() for name, tensor in initial.items()}
        for parameter in self._parameters.values():
            parameter.grad = torch.empty_like(parameter)
        self._optimizer = torch_optimizer(job.optimizer, list(self._parameters.values()))
        self.values = {name: tensor.numpy() for name, tensor in self._results.items()}

    def prepare(self, gradients: Tensors) -> None:
        for name, gradient in gradients.items():
            self._gradients[name].copy_(torch.from_numpy(gradient))

    def step(self) -> None:
        for name, parameter in self._parameters.items():
            assert parameter.grad is not None
            parameter.grad.copy_(self._gradients[name], non_blocking=True)
        self._optimizer.step()
        for name, parameter in self._parameters.items():
            self._results[name].copy_(parameter, non_blocking=True)
        torch.cuda.synchronize()
