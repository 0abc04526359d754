"""The optimizers: a row for each, everything else is read off torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optserve_server.core.errors import InvalidHyperparameterError
from optserve_server.core.kind import Kind
from optserve_server.core.spec import Value
from optserve_server.core.tensors import dtype_name

# Unlike the single element of torch's step counters, so that a probe can tell them apart.
_PROBE_ELEMENTS = 3


def _step(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()


def _step_sgd(optimizer: torch.optim.Optimizer) -> None:
    """Step the parameters whose first gradient this is after the others.

    torch's fused SGD breaks off when some parameters of a group have a momentum already and others
    have not. Each parameter stands for itself, so the order does not matter.
    """
    late: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        if group["momentum"]:
            present = [each for each in group["params"] if each.grad is not None]
            new = [each for each in present if not optimizer.state.get(each)]
            if len(new) < len(present):
                late |= {each: each.grad for each in new}
    for parameter in late:
        parameter.grad = None
    optimizer.step()
    if late:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = late.get(parameter)
        optimizer.step()


@dataclass(frozen=True, kw_only=True)
class OptimizerKind(Kind):
    """One of torch's optimizers."""

    # Two are about the caller's CUDA graph and autograd graph.
    not_offered = frozenset({"params", "capturable", "differentiable"})
    torch_class: type[torch.optim.Optimizer]
    fixed: tuple[str, ...] = ()
    """Hyperparameters that torch reads only once, at construction.

    A later change would be silently without effect.
    """
    fused_dtypes: tuple[torch.dtype, ...] = (
        *(torch.float16, torch.bfloat16),
        *(torch.float32, torch.float64),
    )
    """Data types of which torch's fused update, if there is one, is right."""

    step: Callable[[torch.optim.Optimizer], None] = _step
    """Step the parameters that have a gradient."""


OPTIMIZERS: dict[str, OptimizerKind] = {
    kind.name: kind
    for kind in (
        # On the CPU the fused update misses by more than the step where a tensor of 16-bit floats
        # fills a vector register: seen in torch 2.13.
        OptimizerKind(
            torch_class=torch.optim.SGD,
            fused_dtypes=(torch.float32, torch.float64),
            step=_step_sgd,
        ),
        OptimizerKind(torch_class=torch.optim.Adam),
        OptimizerKind(torch_class=torch.optim.AdamW),
        OptimizerKind(torch_class=torch.optim.RMSprop),
        OptimizerKind(torch_class=torch.optim.Adadelta),
        OptimizerKind(torch_class=torch.optim.Adagrad, fixed=("initial_accumulator_value",)),
        OptimizerKind(torch_class=torch.optim.Adamax),
    )
}


def effective_hyperparameters(
    kind: OptimizerKind, given: Mapping[str, Value], dtypes: Iterable[torch.dtype] = ()
) -> dict[str, Value]:
    """Return every hyperparameter in force: what was given, else torch's default.

    The one departure: ``fused`` is on unless it, or ``foreach``, was given, because it is several
    times faster; and unless it is wrong for one of the parameters' ``dtypes``. Hyperparameters on
    which torch decides at each step (``foreach``) are left out unless given.
    """
    fused = None if given.get("foreach") else set(dtypes) <= set(kind.fused_dtypes)
    values = {**kind.defaults, "fused": fused, **given}
    return {
        name: value for name, value in values.items() if name in kind.defaults and value is not None
    }


def build(
    kind: OptimizerKind, groups: Sequence[tuple[list[Tensor], Mapping[str, Value]]]
) -> torch.optim.Optimizer:
    """Build the optimizer over groups: parameters, and every hyperparameter in force for them.

    Raises:
        InvalidHyperparameterError: torch does not take the hyperparameters.
    """
    # torch reads the fixed ones from here, and only here; they are the same in every group.
    arguments: dict[str, Any] = dict(groups[0][1])
    # What a group leaves to torch it must not get from the first group.
    torch_groups = [{"params": tensors, **kind.defaults, **own} for tensors, own in groups]
    try:
        return kind.torch_class(torch_groups, **arguments)
    except (ValueError, RuntimeError) as error:
        raise _refused(kind, error) from None


def capture(
    optimizer: torch.optim.Optimizer, *, copy: bool
) -> tuple[dict[int, dict[str, Value]], list[dict[str, Value | None]]]:
    """Return what torch keeps, on the CPU, and what it has in force for each group.

    What it keeps stands under the place of its parameter among the groups.

    Args:
        optimizer: To look at.
        copy: Whether tensors that are on the CPU are copied.
    """
    state = optimizer.state_dict()
    kept = {
        position: {name: _on_cpu(value, copy=copy) for name, value in values.items()}
        for position, values in state["state"].items()
        if values
    }
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for group in state["param_groups"]
    ]
    return kept, groups


def restore(
    optimizer: torch.optim.Optimizer,
    kept: Mapping[int, Mapping[str, Value]],
    groups: Sequence[Mapping[str, Value | None]],
) -> None:
    """Give an optimizer what capture() took from one over the same groups.

    Its tensors become the optimizer's.
    """
    places = itertools.count()
    optimizer.load_state_dict(
        {
            "state": {position: dict(values) for position, values in kept.items()},
            "param_groups": [
                {**values, "params": [next(places) for _ in group["params"]]}
                for values, group in zip(groups, optimizer.param_groups, strict=True)
            ],
        }
    )


def rehearse(
    kind: OptimizerKind,
    dtype: torch.dtype,
    device: torch.device,
    old: Mapping[str, Value],
    new: Mapping[str, Value] | None = None,
) -> int:
    """Make a step on a few elements, and one more with changed hyperparameters if they are given.

    It asks torch itself, before anything is touched, whether the hyperparameters go together,
    whether they can be changed in a session that has stepped, and how much state they take.

    Args:
        kind: The optimizer.
        dtype: Of the parameter.
        device: Of the parameter.
        old: Every hyperparameter in force.
        new: Every hyperparameter after a change.

    Returns:
        Bytes of optimizer state for each element of a parameter.

    Raises:
        InvalidHyperparameterError: torch does not take them, or keeps no state for the change.
    """
    for hyperparameters in (old, new or {}):
        if hyperparameters.get("fused") and dtype not in kind.fused_dtypes:
            raise InvalidHyperparameterError(
                f"torch's fused {kind.name} is wrong for {dtype_name(dtype)}; leave fused unset",
                field="optimizer",
                expected="fused unset or false",
                actual="fused = true",
            )
    parameter = torch.zeros(_PROBE_ELEMENTS, dtype=dtype, device=device)
    parameter.grad = torch.zeros_like(parameter)
    optimizer = build(kind, [([parameter], old)])
    try:
        optimizer.step()
    except (ArithmeticError, RuntimeError) as error:  # A number that its data type cannot hold.
        raise _refused(kind, error) from None
    if new is not None:
        # torch checks how hyperparameters go together only at construction.
        build(kind, [([parameter], new)])
        optimizer.param_groups[0].update(new)
        try:
            optimizer.step()
        except (KeyError, RuntimeError):
            changed = ", ".join(name for name in new if new[name] != old[name])
            raise InvalidHyperparameterError(
                f"{changed} of {kind.name} cannot change in a session that has stepped:"
                " torch keeps no state for the change",
                field="optimizer",
                actual=changed,
            ) from None
    state = optimizer.state[parameter].values()
    tensors = [
        value for value in state if isinstance(value, Tensor) and value.shape == parameter.shape
    ]
    return sum(tensor.dtype.itemsize for tensor in tensors)


def _on_cpu(value: Value, *, copy: bool) -> Value:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to("cpu", copy=copy, memory_format=torch.contiguous_format)


def _refused(kind: OptimizerKind, error: Exception) -> InvalidHyperparameterError:
    # torch's own words about hyperparameters that it was given: they are written for its users, who
    # ours are too.
    return InvalidHyperparameterError(
        f"torch's {kind.name} does not take it: {error}", field="optimizer"
    )
