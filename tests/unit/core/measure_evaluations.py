"""Measure how much memory evaluations take; prints JSON: bytes reserved and taken, by name."""

from __future__ import annotations

import gc
import itertools
import json
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from unit.core.measuring import forget_peak, memory

from optserve_server.core.admission import evaluation_bytes
from optserve_server.core.losses import LOSSES, LossFunction
from optserve_server.core.spec import Choice
from optserve_server.core.tensors import spec_of

_ELEMENTS = 2_000_000
_OF_CLASSES = ("CrossEntropyLoss", "NLLLoss")


def main() -> None:
    """Measure each case twice: the first time is for what torch takes at its first use."""
    gc.collect()
    gc.freeze()  # Or each collection would look through all of torch.
    results = {}
    for name, loss, predictions, targets in _cases():
        _measure(loss, predictions, targets)
        results[name] = _measure(loss, predictions, targets)
    sys.stdout.write(json.dumps(results))


def _cases() -> Iterator[tuple[str, LossFunction, Tensor, Tensor]]:
    for kind, classes, dtype, reduction in itertools.product(
        LOSSES, (1, 4, _ELEMENTS), (torch.bfloat16, torch.float32), ("mean", "none")
    ):
        shape = (_ELEMENTS // classes, classes)
        predictions = torch.full(shape, 0.5, dtype=dtype)
        targets = {"values": predictions.clone()}
        if kind in _OF_CLASSES:
            targets["classes"] = torch.zeros(shape[0], dtype=torch.int64)
        if kind == "NLLLoss":
            del targets["values"]
        loss = LossFunction(
            Choice(kind=kind, arguments={"reduction": reduction}), torch.device("cpu")
        )
        for name, wanted in targets.items():
            yield f"{kind} {name} {classes} {dtype} {reduction}", loss, predictions, wanted


def _measure(loss: LossFunction, predictions: Tensor, targets: Tensor) -> tuple[int, int]:
    reserved = evaluation_bytes(spec_of("", predictions), spec_of("", targets))
    gc.collect(1)
    before = memory("VmRSS")
    forget_peak()
    outcome = loss.evaluate(predictions, targets, with_gradient=True)
    taken = memory("VmHWM") - before + predictions.nbytes + targets.nbytes
    del outcome  # Held until now: it is answered.
    return reserved, taken


if __name__ == "__main__":
    main()
