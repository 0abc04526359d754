"""The table of losses that are compared with torch: every one, with every option."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from messages import message_of
from parity.cases import choose
from torch import Tensor

from optserve.v1 import loss_pb2
from optserve.v1.loss_pb2 import Loss, Reduction

CLASSES = 5
ROWS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCase:
    """A loss with its arguments, as torch takes them, and what it is evaluated on."""

    name: str
    kind: str
    """torch's name, which is the contract's too."""
    arguments: Mapping[str, Any]
    predictions: Tensor
    targets: Tensor

    def message(self) -> Loss:
        """Return the loss as a message."""
        arguments = {name: _encoded(value) for name, value in self.arguments.items()}
        return choose(Loss(), getattr(loss_pb2, self.kind)(**arguments))

    def build(self) -> torch.nn.Module:
        """Return torch's own loss."""
        module: torch.nn.Module = getattr(torch.nn, self.kind)(**self.arguments)
        return module


def _encoded(argument: object) -> object:
    if isinstance(argument, Tensor):
        return message_of(argument)
    if isinstance(argument, str):
        return Reduction.Value(f"REDUCTION_{argument.upper()}")
    return argument


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def _uniform(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(8))


def _log_probabilities(*shape: int) -> Tensor:
    return _normal(*shape).log_softmax(1 if len(shape) > 1 else 0)


def _shares(*shape: int) -> Tensor:
    return _uniform(*shape).softmax(1 if len(shape) > 1 else 0)


def _classes(*shape: int) -> Tensor:
    return torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(9))


def _partly(index: int) -> Tensor:
    classes = _classes(ROWS)
    classes[::3] = index
    return classes


_REDUCTIONS = ("mean", "sum", "none")
_WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.0, 0.25])
_FLAT, _IMAGES, _NOTHING = (ROWS, CLASSES), (3, CLASSES, 4, 2), (0, CLASSES)


def _of_classes(kind: str, predictions: Callable[..., Tensor]) -> Iterator[LossCase]:
    """Yield what NLLLoss and CrossEntropyLoss have in common: targets that are class indices."""
    rows, labels = predictions(*_FLAT), _classes(ROWS)
    settings: dict[str, tuple[dict[str, Any], Tensor, Tensor]] = {
        "rows": ({}, rows, labels),
        "one": ({}, predictions(CLASSES), _classes()),
        "images": ({"weight": _WEIGHT}, predictions(*_IMAGES), _classes(3, 4, 2)),
        "nothing": ({}, predictions(*_NOTHING), _classes(0)),
        "fp64": ({"weight": _WEIGHT.double()}, rows.double(), labels),
        "bf16": ({}, rows.bfloat16(), labels),
        "weight": ({"weight": _WEIGHT}, rows, labels),
        "ignored": ({}, rows, _partly(-100)),
        "ignored-class": ({"ignore_index": 2, "weight": _WEIGHT}, rows, labels),
        "ignored-number": ({"ignore_index": 99}, rows, _partly(99)),
        "all-ignored": ({}, rows, torch.full((ROWS,), -100)),
    }
    for (name, (arguments, inputs, targets)), reduction in itertools.product(
        settings.items(), _REDUCTIONS
    ):
        yield LossCase(
            name=f"{kind}-{name}-{reduction}",
            kind=kind,
            arguments={**arguments, "reduction": reduction},
            predictions=inputs,
            targets=targets,
        )


def _of_probabilities() -> Iterator[LossCase]:
    """Yield what CrossEntropyLoss has beside class indices: probabilities, and smoothed labels."""
    targets = {
        "classes": (_normal(*_FLAT), _partly(-100)),
        "shares": (_normal(*_FLAT), _shares(*_FLAT)),
        "shares-of-one": (_normal(CLASSES), _shares(CLASSES)),
        "shares-of-images": (_normal(*_IMAGES), _shares(*_IMAGES)),
    }
    weights: dict[str, dict[str, Any]] = {"plain": {}, "weight": {"weight": _WEIGHT}}
    for (name, (inputs, wanted)), smoothing, weight, reduction in itertools.product(
        targets.items(), (0.0, 0.1, 1.0), weights, _REDUCTIONS
    ):
        yield LossCase(
            name=f"CrossEntropyLoss-{name}-{weight}-smooth-{smoothing}-{reduction}",
            kind="CrossEntropyLoss",
            arguments={
                **weights[weight],
                "label_smoothing": smoothing,
                "reduction": reduction,
            },
            predictions=inputs,
            targets=wanted,
        )


def _of_pairs() -> Iterator[LossCase]:
    """Yield the losses whose predictions and targets are of one shape."""
    corners = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5]), torch.tensor([0.0, 1.0, 1.0, 0.0, 0.5])
    weights = {"row": _WEIGHT, "column": _uniform(ROWS, 1), "scalar": torch.tensor(0.5)}
    settings: dict[str, tuple[str, dict[str, Any], Tensor, Tensor]] = {
        "binary": ("BCELoss", {}, _uniform(*_FLAT), _shares(*_FLAT)),
        "binary-labels": ("BCELoss", {}, _uniform(*_FLAT), (_normal(*_FLAT) > 0).float()),
        "binary-corners": ("BCELoss", {}, *corners),
        "divergence": ("KLDivLoss", {}, _log_probabilities(*_FLAT), _shares(*_FLAT)),
        "divergence-zeros": (
            "KLDivLoss",
            {},
            _log_probabilities(*_FLAT),
            _shares(*_FLAT) * (_normal(*_FLAT) > 0),
        ),
        "divergence-logs": (
            "KLDivLoss",
            {"log_target": True},
            _log_probabilities(*_IMAGES),
            _shares(*_IMAGES).log(),
        ),
    }
    for name, weight in weights.items():
        pair = (_uniform(*_FLAT), _shares(*_FLAT))
        settings[f"binary-{name}-weight"] = ("BCELoss", {"weight": weight}, *pair)
    for kind, name in itertools.product(("MSELoss", "L1Loss"), ("flat", "images", "scalar")):
        shape = {"flat": _FLAT, "images": _IMAGES, "scalar": ()}[name]
        settings[name + kind] = (kind, {}, _normal(*shape), _uniform(*shape))
    settings["nothing"] = ("MSELoss", {}, _normal(*_NOTHING), _uniform(*_NOTHING))
    settings["fp64"] = ("L1Loss", {}, _normal(*_FLAT).double(), _uniform(*_FLAT).double())
    settings["fp16"] = ("MSELoss", {}, _normal(*_FLAT).half(), _uniform(*_FLAT).half())
    for (name, (kind, arguments, inputs, targets)), reduction in itertools.product(
        settings.items(), (*_REDUCTIONS, "batchmean")
    ):
        if reduction != "batchmean" or kind == "KLDivLoss":
            yield LossCase(
                name=f"{kind}-{name}-{reduction}",
                kind=kind,
                arguments={**arguments, "reduction": reduction},
                predictions=inputs,
                targets=targets,
            )


def _of_defaults() -> Iterator[LossCase]:
    """Yield every loss without an argument."""
    flat = {
        "NLLLoss": (_log_probabilities(*_FLAT), _classes(ROWS)),
        "CrossEntropyLoss": (_normal(*_FLAT), _classes(ROWS)),
        "BCELoss": (_uniform(*_FLAT), _shares(*_FLAT)),
        "KLDivLoss": (_log_probabilities(*_FLAT), _shares(*_FLAT)),
        "MSELoss": (_normal(*_FLAT), _uniform(*_FLAT)),
        "L1Loss": (_normal(*_FLAT), _uniform(*_FLAT)),
    }
    for kind, (inputs, targets) in flat.items():
        yield LossCase(
            name=f"{kind}-defaults", kind=kind, arguments={}, predictions=inputs, targets=targets
        )


LOSSES = (
    *_of_defaults(),
    *_of_classes("NLLLoss", _log_probabilities),
    *_of_classes("CrossEntropyLoss", _normal),
    *_of_probabilities(),
    *_of_pairs(),
)
