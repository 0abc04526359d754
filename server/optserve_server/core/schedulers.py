"""The schedulers: a row for each, everything else is read off torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optserve_server.core.errors import (
    InvalidExpressionError,
    InvalidFieldError,
    InvalidHyperparameterError,
    MissingFieldError,
    ScheduleFailedError,
)
from optserve_server.core.expression import Expression
from optserve_server.core.kind import Kind
from optserve_server.core.limits import Limits
from optserve_server.core.spec import Choice, Value


@dataclass(frozen=True, kw_only=True)
class SchedulerKind(Kind):
    """One of torch's schedulers."""

    not_offered = frozenset({"optimizer", "last_epoch"})  # One is the session, one its count.
    torch_class: type[torch.optim.lr_scheduler.LRScheduler]


SCHEDULERS: dict[str, SchedulerKind] = {
    kind.name: kind
    for kind in (
        SchedulerKind(torch_class=torch.optim.lr_scheduler.StepLR),
        SchedulerKind(torch_class=torch.optim.lr_scheduler.MultiStepLR),
        SchedulerKind(torch_class=torch.optim.lr_scheduler.ExponentialLR),
        SchedulerKind(torch_class=torch.optim.lr_scheduler.LambdaLR),
    )
}


def effective_arguments(choice: Choice) -> dict[str, Value]:
    """Return every argument in force.

    Raises:
        MissingFieldError: A required one was not given.
    """
    defaults = SCHEDULERS[choice.kind].defaults
    if "lr_lambda" in defaults:
        return dict(choice.arguments)  # Schedule demands exactly one of their two forms.
    for name, default in defaults.items():
        if default is None and name not in choice.arguments:
            raise MissingFieldError(f"{choice.kind} needs {name}", field=name, expected=name)
    values = {**defaults, **choice.arguments}
    return {name: value for name, value in values.items() if value is not None}


class Schedule:
    """torch's scheduler over an optimizer, with a look ahead: a step never fails half way."""

    def __init__(self, choice: Choice, optimizer: torch.optim.Optimizer, limits: Limits) -> None:
        """Build the scheduler, which sets the initial rates.

        Raises:
            InvalidExpressionError: An expression is not arithmetic, or has no finite value for the
                first count.
            InvalidFieldError: There are not as many expressions as groups.
            InvalidHyperparameterError: A first rate is not finite.
        """
        arguments: dict[str, Any] = dict(choice.arguments)
        self._expressions: list[Expression] = []
        if choice.kind == torch.optim.lr_scheduler.LambdaLR.__name__:
            self._expressions = _expressions(arguments, len(optimizer.param_groups), limits)
            arguments = {"lr_lambda": self._expressions}
        self._torch = SCHEDULERS[choice.kind].torch_class(optimizer, **arguments)
        for group, rate in enumerate(self._torch.get_last_lr()):
            if not math.isfinite(rate):
                raise InvalidHyperparameterError(
                    f"the schedule gives group {group} the learning rate {float(rate)}",
                    field="scheduler",
                    expected="a finite learning rate",
                    actual=float(rate),
                )

    def check_next(self) -> None:
        """Make sure that advance() will work, before anything is changed.

        Raises:
            ScheduleFailedError: An expression has no finite value for the next count, or a rate
                would not be finite.
        """
        try:
            rates = self._next_rates()
        except InvalidExpressionError as error:
            raise ScheduleFailedError(
                f"{error.message}: the schedule has come to its end",
                field=error.field,
                expected=error.expected,
                actual=error.actual,
            ) from None
        except OverflowError:  # Of Python's floats; others become infinite.
            rates = [math.inf]
        if not all(map(math.isfinite, rates)):
            raise ScheduleFailedError(
                "the next learning rate would not be finite: the schedule has come to its end",
                field="scheduler",
                expected="a finite learning rate",
                actual=", ".join(str(float(rate)) for rate in rates),
            )

    def _next_rates(self) -> Sequence[float]:
        """Return the rates that advance() will set, from torch itself, which only looks."""
        scheduler = self._torch
        scheduler.last_epoch += 1
        # Or torch would warn that the rates of now are asked for elsewhere.
        scheduler._get_lr_called_within_step = True  # noqa: SLF001
        try:
            return [float(rate) for rate in scheduler.get_lr()]
        finally:
            scheduler.last_epoch -= 1
            scheduler._get_lr_called_within_step = False  # noqa: SLF001

    def advance(self) -> None:
        """Set the rates of the next count; check_next() said that it will work."""
        self._torch.step()

    def capture(self) -> dict[str, Value | None]:
        """Return where the schedule stands: what torch keeps beside the scheduler's arguments."""
        state: dict[str, Any] = self._torch.state_dict()
        arguments = {"lr_lambdas", *SCHEDULERS[type(self._torch).__name__].defaults}
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in state.items()
            if name not in arguments
        }

    def restore(self, state: Mapping[str, Value | None], *, stepped: bool) -> None:
        """Go on from where capture() found the schedule.

        Args:
            state: As it was returned.
            stepped: Whether the session has stepped.
        """
        listed = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in state.items()
        }
        self._torch.load_state_dict({**self._torch.state_dict(), **listed})
        # Or torch would warn that the schedule advances before the optimizer's first step.
        self._torch.optimizer._opt_called = stepped  # type: ignore[attr-defined]  # noqa: SLF001

    def check_rebase(self, group: int, lr: float) -> None:
        """Make sure that rebase() will work, before anything is changed.

        Raises:
            InvalidHyperparameterError: The present rate is so small that ``lr`` is in no proportion
                to it.
        """
        if not math.isfinite(self._base(group, lr)):
            rate = float(self._torch.optimizer.param_groups[group]["lr"])
            raise InvalidHyperparameterError(
                f"the schedule cannot go on in proportion from {rate} to {lr}: the rate that it"
                " began with would not be finite",
                field="optimizer.lr",
                expected=f"a learning rate in proportion to {rate}",
                actual=lr,
            )

    def rebase(self, group: int, lr: float) -> None:
        """Make ``lr`` the rate of a group from now on; check_rebase() said that it will work.

        The schedule goes on from it in proportion. From a rate of 0, to which nothing is in
        proportion, it goes on as if it had begun with ``lr``.
        """
        torch_group = self._torch.optimizer.param_groups[group]
        base = self._base(group, lr)
        self._torch.base_lrs[group] = torch_group["initial_lr"] = base
        torch_group["lr"] = lr

    def _base(self, group: int, lr: float) -> float:
        """Return the rate that the schedule would have begun with if ``lr`` were the present."""
        present = float(self._torch.optimizer.param_groups[group]["lr"])
        return float(self._torch.base_lrs[group]) * (lr / present) if present else lr


def _expressions(arguments: Mapping[str, Value], groups: int, limits: Limits) -> list[Expression]:
    """Compile one expression for each group, from one for all or from one for each."""
    one, many = arguments.get("lr_lambda"), arguments.get("group_lr_lambdas")
    texts = (
        [one] * groups if isinstance(one, str) else list(many) if isinstance(many, tuple) else []
    )
    if (one is None) == (many is None):
        raise InvalidFieldError(
            "LambdaLR needs either lr_lambda or group_lr_lambdas",
            field="scheduler.lambda_lr",
            expected="one of lr_lambda and group_lr_lambdas",
            actual="neither" if one is None else "both",
        )
    if len(texts) != groups:
        raise InvalidFieldError(
            f"LambdaLR has {len(texts)} expressions; the session has {groups} groups",
            field="scheduler.lambda_lr.group_lr_lambdas",
            expected=f"{groups} expressions",
            actual=f"{len(texts)} expressions",
        )
    return [
        Expression(
            str(text),
            chars_max=limits.expression_chars_max,
            nodes_max=limits.expression_nodes_max,
            field="scheduler.lambda_lr." + ("group_lr_lambdas" if one is None else "lr_lambda"),
        )
        for text in texts
    ]
