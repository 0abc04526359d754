"""A Ray actor that holds model and optimizer; tensors go through Ray's object store."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from benchmarks.job import TESTS, BlockingPeer, Job, SkippedError
from benchmarks.model import Array, Tensors
from benchmarks.training import torch_optimizer

_STORE_BYTES_MIN = 256 << 20
_STORE_COPIES = 8  # Gradients and parameters of the step, and of those that are not yet collected.


@contextmanager
def connect(job: Job) -> Iterator[RayPeer]:
    """Start Ray on this machine alone, and the actor in a process of it."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    try:
        import ray  # noqa: PLC0415 - It need not be installed.
    except ImportError as error:
        raise SkippedError("Ray is not installed; `make bench` installs it") from error
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=max(_STORE_BYTES_MIN, _STORE_COPIES * job.model().tensor_bytes),
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(TESTS), *_python_path()])}},
    )
    try:
        yield RayPeer(job, ray)
    finally:
        ray.shutdown()


class Trained:
    """The model and its optimizer, in the actor's process."""

    def __init__(self, job: str) -> None:
        told = Job.from_json(job)
        torch.set_num_threads(told.threads)  # Ray's own choice is 1.
        # Gradients from the object store are read-only, and torch only reads them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self._parameters = [torch.from_numpy(value) for value in told.model().initial().values()]
        self._optimizer = torch_optimizer(told.optimizer, self._parameters)

    def step(self, gradients: Sequence[Array]) -> list[Array]:
        """Step with gradients in the model's order, and return the parameters."""
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = torch.from_numpy(gradient)
        self._optimizer.step()
        return [parameter.numpy() for parameter in self._parameters]


class RayPeer(BlockingPeer):
    """The caller of one actor."""

    def __init__(self, job: Job, ray: Any) -> None:  # noqa: ANN401 - Ray has no types of its own.
        super().__init__(job)
        self._ray = ray
        self._actor = ray.remote(Trained).remote(job.to_json())
        self._gradients: list[Array] = []
        self._parameters: list[Array] = []

    def prepare(self, gradients: Tensors) -> None:
        self._gradients = list(gradients.values())

    def step(self) -> None:
        self._parameters = self._ray.get(self._actor.step.remote(self._gradients))

    def parameters(self) -> Tensors:
        return dict(zip(self.gradient_sets[0], self._parameters, strict=True))


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
