"""The service that one writes in an afternoon: a unary call, torch.save and torch.load.

Without message limits, with gRPC's threaded server, and with a fused optimizer.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeAlias

import grpc
import torch
from benchmarks.job import BlockingPeer, Job, serving
from benchmarks.model import Tensors
from benchmarks.training import torch_optimizer
from torch import Tensor

_SERVICE, _METHOD = "bench.Naive", "Step"
_Unary: TypeAlias = "grpc.UnaryUnaryMultiCallable[bytes, bytes]"

_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@contextmanager
def connect(job: Job) -> Iterator[NaivePeer]:
    """Start a server, and connect to it."""
    with serving(job) as address, grpc.insecure_channel(address, options=_OPTIONS) as channel:
        yield NaivePeer(job, channel)


def serve(job: Job, announce: Callable[[str], None]) -> None:
    """Step one model with what clients send."""
    parameters = {name: torch.from_numpy(value) for name, value in job.model().initial().items()}
    optimizer = torch_optimizer(job.optimizer, list(parameters.values()))

    def step(request: bytes, _context: grpc.ServicerContext) -> bytes:
        for name, gradient in _loaded(request).items():
            parameters[name].grad = gradient
        optimizer.step()
        return _saved(parameters)

    server = grpc.server(ThreadPoolExecutor(4), options=_OPTIONS)
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        _METHOD: grpc.unary_unary_rpc_method_handler(step)
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(_SERVICE, handlers)])
    port = server.add_insecure_port(f"{job.host}:0")
    server.start()
    announce(f"{job.host}:{port}")
    server.wait_for_termination()


class NaivePeer(BlockingPeer):
    """One channel."""

    def __init__(self, job: Job, channel: grpc.Channel) -> None:
        super().__init__(job)
        call: _Unary = channel.unary_unary(f"/{_SERVICE}/{_METHOD}")
        self._step = call
        self._gradients: Mapping[str, Tensor] = {}
        self._parameters: Mapping[str, Tensor] = {}

    def prepare(self, gradients: Tensors) -> None:
        self._gradients = {name: torch.from_numpy(value) for name, value in gradients.items()}

    def step(self) -> None:
        self._parameters = _loaded(self._step(_saved(self._gradients)))

    def parameters(self) -> Tensors:
        return {name: tensor.numpy() for name, tensor in self._parameters.items()}


def _saved(tensors: Mapping[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    return buffer.getvalue()


def _loaded(data: bytes) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(io.BytesIO(data))
    return tensors
