"""Measure how much memory sessions take; prints JSON: bytes reserved and bytes taken, by name."""

from __future__ import annotations

import gc
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from parity.cases import OptimizerCase
from unit.core.measuring import forget_peak, memory

from optserve.v1.session_pb2 import SessionSpec
from optserve.v1.tensor_pb2 import DataType, TensorHeader
from optserve_server.core.admission import session_bytes
from optserve_server.core.device import Device
from optserve_server.core.limits import Limits
from optserve_server.core.session import Session
from optserve_server.rpc.decode_spec import session_spec
from optserve_server.rpc.encoded import GradientTargets, ParameterSources

Options = Mapping[str, Any]

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "alike": [(500, 1000)] * 4,
    "one-large": [(1000, 1000), (1000,), (10,)],
}
# The options that take memory.
EVERYTHING: dict[str, Options] = {
    "SGD": {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
    "Adam": {"amsgrad": True, "weight_decay": 0.1, "maximize": True},
    "AdamW": {"amsgrad": True, "maximize": True},
    "RMSprop": {"centered": True, "momentum": 0.9, "weight_decay": 0.1, "maximize": True},
    "Adadelta": {"weight_decay": 0.1, "maximize": True},
    "Adagrad": {"lr_decay": 0.1, "weight_decay": 0.1, "maximize": True},
    "Adamax": {"weight_decay": 0.1, "maximize": True},
}
CPU = Device("cpu")


def main() -> None:
    """Measure each case once; the first once more, for what torch takes at its first use."""
    cases = list(_cases())
    gc.collect()
    gc.freeze()  # Or each collection would look through all of torch.
    _measure(cases[0][1])
    sys.stdout.write(json.dumps({name: _measure(spec) for name, spec in cases}))


def _cases() -> Iterator[tuple[str, SessionSpec]]:
    for kind, (shapes_name, shapes), data_type in itertools.product(
        EVERYTHING, SHAPES.items(), (DataType.DATA_TYPE_FP32, DataType.DATA_TYPE_BF16)
    ):
        few = data_type == DataType.DATA_TYPE_BF16
        for way in _ways(kind, data_type):
            for options in ({}, EVERYTHING[kind])[few:]:
                hyperparameters = {**options, **way}
                case = OptimizerCase(name="", kind=kind, hyperparameters=hyperparameters, own={})
                headers = [
                    TensorHeader(name=str(i), data_type=data_type, shape=shape)
                    for i, shape in enumerate(shapes)
                ]
                spec = SessionSpec(parameters=headers, optimizer=case.message(hyperparameters))
                yield f"{kind} {hyperparameters} {shapes_name} {DataType.Name(data_type)}", spec
    for way in _ways("Adam", DataType.DATA_TYPE_FP32):
        hyperparameters = {**EVERYTHING["Adam"], **way}
        case = OptimizerCase(name="", kind="Adam", hyperparameters=hyperparameters, own={})
        headers = [
            TensorHeader(name=str(i).zfill(250), data_type=DataType.DATA_TYPE_FP32, shape=(1,))
            for i in range(3_000)
        ]
        spec = SessionSpec(parameters=headers, optimizer=case.message(hyperparameters))
        yield f"Adam {hyperparameters} FP32 tiny", spec


def _ways(kind: str, data_type: DataType.ValueType) -> list[Options]:
    """Return the ways in which torch can compute the update."""
    if kind not in ("SGD", "Adam", "AdamW", "Adagrad"):
        return [{"foreach": False}, {"foreach": True}]
    plain: list[Options] = [{"fused": False}, {"foreach": True}]
    if kind == "SGD" and data_type == DataType.DATA_TYPE_BF16:
        return plain  # The fused one is wrong there, and refused.
    return [*plain, {"fused": True}]


def _measure(message: SessionSpec) -> tuple[int, int]:
    gc.collect(1)
    before = memory("VmRSS")
    spec = session_spec(message, Limits())
    reserved = session_bytes(spec, CPU.torch)
    session = Session(spec, CPU, Limits())
    # As a stream of its worker has them.
    sources = ParameterSources(spec.wire.parameters).of(session.parameters)
    staging = [CPU.staging(parameter) for parameter in spec.parameters]
    targets = GradientTargets(spec.wire.gradients).of(staging)
    session.set_parameters(dict.fromkeys(range(len(spec.parameters)), torch.zeros(())))
    forget_peak()
    for _ in range(2):
        for gradient in staging:
            gradient.fill_(1)
        session.step(list(staging))
    taken = memory("VmHWM") - before
    del sources, targets  # Held until now.
    return reserved, taken


if __name__ == "__main__":
    main()
