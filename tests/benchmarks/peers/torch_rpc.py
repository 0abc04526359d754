"""torch RPC: the same step as a remote call between two processes, over TensorPipe.

The option ``channels`` chooses "tcp" (libuv's transport, bytes through it) or "same-host" (shared
memory for the messages, and tensors straight from the other process's memory).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from benchmarks.job import BlockingPeer, Job, serving
from benchmarks.model import Tensors
from benchmarks.training import torch_optimizer
from torch import Tensor
from torch.distributed import rpc

_SERVER, _CLIENT = "server", "client"
_TRANSPORTS = {"tcp": ["uv"], "same-host": ["shm", "uv"]}
_CHANNELS = {"tcp": ["basic"], "same-host": ["cma", "basic"]}
_TIMEOUT_S = 120.0


class _Trained:
    """The model and its optimizer, in the server process."""

    def __init__(self, job: Job) -> None:
        self._parameters = [torch.from_numpy(value) for value in job.model().initial().values()]
        self._optimizer = torch_optimizer(job.optimizer, self._parameters)

    def step(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Step with gradients in the model's order, and return the parameters."""
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        return self._parameters


_trained: list[_Trained] = []  # One, in the server; a remote call reaches only what a module has.


def step(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Step the model of this process."""
    return _trained[0].step(gradients)


@contextmanager
def connect(job: Job) -> Iterator[RpcPeer]:
    """Start a server process, and meet it in a file."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        meeting = replace(job, options={**job.options, "meeting": str(Path(folder, "meeting"))})
        with serving(meeting):
            _join(meeting, _CLIENT, rank=1)
            yield RpcPeer(job)
            rpc.shutdown(graceful=False)


def serve(job: Job, announce: Callable[[str], None]) -> None:
    """Meet the client, and answer it until killed."""
    _trained.append(_Trained(job))
    announce(job.host)
    _join(job, _SERVER, rank=0)
    rpc.shutdown()  # Waits for the client, which does not say goodbye.


class RpcPeer(BlockingPeer):
    """The caller."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._gradients: list[Tensor] = []
        self._parameters: list[Tensor] = []

    def prepare(self, gradients: Tensors) -> None:
        self._gradients = [torch.from_numpy(value) for value in gradients.values()]

    def step(self) -> None:
        self._parameters = rpc.rpc_sync(_SERVER, step, args=(self._gradients,))

    def parameters(self) -> Tensors:
        names = self.gradient_sets[0]
        return dict(zip(names, (each.numpy() for each in self._parameters), strict=True))


def _join(job: Job, name: str, rank: int) -> None:
    # Else both listen where the host's own name leads.
    interface = job.options.get(f"{name}_interface", "lo")
    os.environ |= {"TP_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    channels = job.options["channels"]
    options = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=4,
        rpc_timeout=_TIMEOUT_S,
        init_method=f"file://{job.options['meeting']}",
        _transports=_TRANSPORTS[channels],
        _channels=_CHANNELS[channels],
    )
    rpc.init_rpc(name, rank=rank, world_size=2, rpc_backend_options=options)
