"""The losses.

A row for each, with what torch does not check for itself, or would check by ending a CUDA process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optserve_server.core.errors import (
    DataTypeMismatchError,
    InvalidFieldError,
    MemoryExhaustedError,
    ShapeMismatchError,
    TargetOutOfRangeError,
)
from optserve_server.core.kind import Kind
from optserve_server.core.spec import Choice, Value
from optserve_server.core.tensors import dtype_name


@dataclass(frozen=True, kw_only=True)
class LossKind(Kind):
    """One of torch's losses."""

    not_offered = frozenset({"size_average", "reduce"})  # Deprecated: `reduction` says it all.
    torch_class: type[torch.nn.Module]
    check: Callable[[torch.nn.Module, Tensor, Tensor], None]
    """Refuse predictions and targets that do not fit each other or the loss."""
    class_weight: bool = False
    """Whether the argument ``weight`` is one number for each class."""
    accuracy: Callable[[torch.nn.Module, Tensor, Tensor], float | None] = lambda *_: None
    """Share of right predictions; None where there is none to speak of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutcome:
    """What an evaluation found."""

    loss: float
    """The value; with reduction "none" the sum of the elements."""
    accuracy: float | None
    gradient: Tensor | None
    """Of ``loss`` with respect to the predictions; their shape and dtype; on the CPU.

    None: not asked for.
    """
    elements: Tensor | None
    """The elements of the loss, on the CPU. None: the reduction is not "none"."""


def effective_arguments(choice: Choice) -> dict[str, Value]:
    """Return every argument in force: what was given, else torch's default."""
    values = {**LOSSES[choice.kind].defaults, **choice.arguments}
    return {name: value for name, value in values.items() if value is not None}


class LossFunction:
    """torch's loss on a device, with a look at what it is given before it computes."""

    def __init__(self, choice: Choice, device: torch.device) -> None:
        """Build the loss.

        Raises:
            InvalidFieldError: torch does not take the arguments.
        """
        arguments = effective_arguments(choice)
        reductions = ["none", "mean", "sum"] + ["batchmean"] * (choice.kind == "KLDivLoss")
        if arguments["reduction"] not in reductions:
            raise InvalidFieldError(
                f"{choice.kind} has no reduction {arguments['reduction']!r}",
                field="loss.reduction",
                expected=", ".join(reductions),
                actual=arguments["reduction"],
            )
        self._kind = LOSSES[choice.kind]
        weight = arguments.get("weight")
        if self._kind.class_weight and isinstance(weight, Tensor) and weight.dim() != 1:
            raise ShapeMismatchError(
                f"weight has shape {tuple(weight.shape)}; {choice.kind} takes one for each class",
                field="loss.weight",
                expected="(C)",
                actual=tuple(weight.shape),
            )
        self._device = device
        self._module = self._kind.torch_class(**arguments).to(device)

    def evaluate(self, predictions: Tensor, targets: Tensor, *, with_gradient: bool) -> LossOutcome:
        """Compute the loss, the accuracy and, if asked for, the gradient of the predictions.

        Args:
            predictions: On the CPU; shape as the loss asks for.
            targets: On the CPU; shape and dtype as the loss asks for.
            with_gradient: Whether to compute the gradient.

        Raises:
            CallerError: Predictions and targets do not fit each other, or the loss.
        """
        if not predictions.is_floating_point():
            raise DataTypeMismatchError(
                f"predictions are {dtype_name(predictions.dtype)}; they must be floating point",
                field="predictions.data_type",
                expected="FP16, BF16, FP32 or FP64",
                actual=dtype_name(predictions.dtype),
            )
        self._kind.check(self._module, predictions, targets)
        inputs = predictions.to(self._device).requires_grad_(with_gradient)
        with torch.enable_grad():
            values = self._forward(inputs, targets)
            total = values.sum() if values.dim() else values
        gradient = torch.autograd.grad(total, inputs)[0] if with_gradient else None
        return LossOutcome(
            loss=total.item(),
            accuracy=self._kind.accuracy(self._module, predictions.detach(), targets),
            gradient=None if gradient is None else gradient.cpu().contiguous(),
            elements=values.detach().cpu().contiguous()
            if self._module.reduction == "none"
            else None,
        )

    def _forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        try:
            values: Tensor = self._module(inputs, targets.to(self._device))
        except torch.OutOfMemoryError:
            raise MemoryExhaustedError(
                "the device has no memory left for the evaluation; send less at once",
                field="predictions",
                retry_after_s=5.0,
            ) from None
        except (RuntimeError, ValueError, IndexError):
            # What the checks do not foresee: torch has no kernel for it.
            raise InvalidFieldError(
                f"{self._kind.name} takes no predictions of shape {tuple(inputs.shape)} and"
                f" {dtype_name(inputs.dtype)} with targets of shape {tuple(targets.shape)} and"
                f" {dtype_name(targets.dtype)}",
                field="predictions",
            ) from None
        return values


def _check_classes(module: torch.nn.Module, predictions: Tensor, targets: Tensor) -> None:
    """Predictions (N, C, …) or (C) with class indices (N, …) or a scalar."""
    if targets.dtype != torch.int64:
        raise DataTypeMismatchError(
            f"targets are {dtype_name(targets.dtype)}; class indices are INT64",
            field="targets.data_type",
            expected="INT64",
            actual=dtype_name(targets.dtype),
        )
    if predictions.dim() == 0:
        raise ShapeMismatchError(
            "predictions are a scalar; they must have a dimension for the classes",
            field="predictions.shape",
            expected="(C) or (N, C, ...)",
            actual="()",
        )
    shape = tuple(predictions.shape)
    wanted = shape[:1] + shape[2:] if len(shape) > 1 else ()
    if tuple(targets.shape) != wanted:
        raise ShapeMismatchError(
            f"targets have shape {tuple(targets.shape)};"
            f" predictions of shape {shape} need {wanted}",
            field="targets.shape",
            expected=wanted,
            actual=tuple(targets.shape),
        )
    classes = _class_count(predictions)
    _check_weight(module, predictions, (classes,))
    outside = ((targets < 0) | (targets >= classes)) & (targets != _ignore_index(module))
    if outside.any():
        value = int(targets[outside][0])
        raise TargetOutOfRangeError(
            f"a target is {value}; the classes are 0 to {classes - 1}",
            field="targets",
            expected=f"0 to {classes - 1}, or {_ignore_index(module)} to ignore",
            actual=value,
        )


def _check_classes_or_probabilities(
    module: torch.nn.Module, predictions: Tensor, targets: Tensor
) -> None:
    """As _check_classes, or probabilities of the predictions' shape and dtype."""
    if not targets.is_floating_point():
        _check_classes(module, predictions, targets)
        return
    _check_alike(module, predictions, targets)
    if predictions.dim() == 0:
        raise ShapeMismatchError(
            "predictions are a scalar; they must have a dimension for the classes",
            field="predictions.shape",
            expected="(C) or (N, C, ...)",
            actual="()",
        )
    _check_weight(module, predictions, (_class_count(predictions),))


def _check_alike(_: torch.nn.Module, predictions: Tensor, targets: Tensor) -> None:
    """Targets of the predictions' shape and dtype.

    Torch would broadcast or promote them instead.
    """
    if targets.dtype != predictions.dtype:
        raise DataTypeMismatchError(
            f"targets are {dtype_name(targets.dtype)};"
            f" the predictions are {dtype_name(predictions.dtype)}",
            field="targets.data_type",
            expected=dtype_name(predictions.dtype),
            actual=dtype_name(targets.dtype),
        )
    if targets.shape != predictions.shape:
        raise ShapeMismatchError(
            f"targets have shape {tuple(targets.shape)};"
            f" the predictions have {tuple(predictions.shape)}",
            field="targets.shape",
            expected=tuple(predictions.shape),
            actual=tuple(targets.shape),
        )


def _check_probabilities(module: torch.nn.Module, predictions: Tensor, targets: Tensor) -> None:
    """Both between 0 and 1."""
    _check_alike(module, predictions, targets)
    weight = getattr(module, "weight", None)
    if weight is not None and not _broadcasts(weight.shape, predictions.shape):
        raise ShapeMismatchError(
            f"the loss's weight has shape {tuple(weight.shape)}, which does not broadcast to the"
            f" predictions' {tuple(predictions.shape)}",
            field="predictions.shape",
            expected=f"a shape that {tuple(weight.shape)} broadcasts to",
            actual=tuple(predictions.shape),
        )
    if weight is not None:
        _check_weight(module, predictions, tuple(weight.shape))
    for name, tensor in (("predictions", predictions), ("targets", targets)):
        _check_range(name, tensor, ~((tensor >= 0) & (tensor <= 1)), "between 0 and 1")


def _check_divergence(module: torch.nn.Module, predictions: Tensor, targets: Tensor) -> None:
    """Targets are probabilities, if they are not logarithms."""
    _check_alike(module, predictions, targets)
    if not module.log_target:
        _check_range("targets", targets, ~(targets >= 0), "at least 0")


def _check_range(name: str, tensor: Tensor, outside: Tensor, expected: str) -> None:
    if outside.any():
        value = tensor[outside].flatten()[0].item()
        error = TargetOutOfRangeError if name == "targets" else InvalidFieldError
        raise error(
            f"{name} hold {value}; all must be {expected}",
            field=name,
            expected=expected,
            actual=value,
        )


def _check_weight(module: torch.nn.Module, predictions: Tensor, shape: tuple[int, ...]) -> None:
    weight = getattr(module, "weight", None)
    if weight is None:
        return
    if weight.dtype != predictions.dtype:
        raise DataTypeMismatchError(
            f"predictions are {dtype_name(predictions.dtype)};"
            f" the loss's weight is {dtype_name(weight.dtype)}",
            field="predictions.data_type",
            expected=dtype_name(weight.dtype),
            actual=dtype_name(predictions.dtype),
        )
    if tuple(weight.shape) != shape:
        raise ShapeMismatchError(
            f"predictions have {shape[0]} classes;"
            f" the loss's weight has shape {tuple(weight.shape)}",
            field="predictions.shape",
            expected=tuple(weight.shape),
            actual=shape,
        )


def _broadcasts(source: torch.Size, target: torch.Size) -> bool:
    padded = (1,) * (len(target) - len(source)) + tuple(source)
    return len(padded) == len(target) and all(
        size in (1, wanted) for size, wanted in zip(padded, target, strict=True)
    )


def _class_count(predictions: Tensor) -> int:
    return int(predictions.shape[1] if predictions.dim() > 1 else predictions.shape[0])


def _ignore_index(module: torch.nn.Module) -> int:
    index: int = module.ignore_index  # type: ignore[assignment]
    return index


def _class_accuracy(module: torch.nn.Module, predictions: Tensor, targets: Tensor) -> float | None:
    """Share of targets whose class has the largest prediction; ignored ones do not count."""
    dim = 1 if predictions.dim() > 1 else 0
    if targets.is_floating_point():
        counted = torch.ones((), dtype=torch.bool)
        targets = targets.argmax(dim) if _class_count(predictions) else targets.new_empty(0)
    else:
        counted = targets != _ignore_index(module)
    if targets.numel() == 0 or _class_count(predictions) == 0:
        return None
    counted = counted.expand(targets.shape)
    count = int(counted.sum())
    right = (predictions.argmax(dim) == targets) & counted
    return int(right.sum()) / count if count else None


def _binary_accuracy(_: torch.nn.Module, predictions: Tensor, targets: Tensor) -> float | None:
    """Share of elements on the right side of a half, where every target is 0 or 1."""
    if targets.numel() == 0 or not ((targets == 0) | (targets == 1)).all():
        return None
    return float(((predictions >= 0.5) == (targets >= 0.5)).double().mean())


LOSSES: dict[str, LossKind] = {
    kind.name: kind
    for kind in (
        LossKind(
            torch_class=torch.nn.NLLLoss,
            check=_check_classes,
            class_weight=True,
            accuracy=_class_accuracy,
        ),
        LossKind(
            torch_class=torch.nn.CrossEntropyLoss,
            check=_check_classes_or_probabilities,
            class_weight=True,
            accuracy=_class_accuracy,
        ),
        LossKind(
            torch_class=torch.nn.BCELoss, check=_check_probabilities, accuracy=_binary_accuracy
        ),
        LossKind(torch_class=torch.nn.KLDivLoss, check=_check_divergence),
        LossKind(torch_class=torch.nn.MSELoss, check=_check_alike),
        LossKind(torch_class=torch.nn.L1Loss, check=_check_alike),
    )
}
