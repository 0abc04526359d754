"""Schedulers, by torch.optim.lr_scheduler's names, arguments and defaults.

``LambdaLR`` takes an expression of ``epoch`` as text, for no code crosses the wire:
``LambdaLR(lr_lambda="0.95 ** epoch")``.
"""

from __future__ import annotations

from typing import TypeAlias

from optserve.v1.scheduler_pb2 import ExponentialLR, LambdaLR, MultiStepLR, StepLR

AnyScheduler: TypeAlias = StepLR | MultiStepLR | ExponentialLR | LambdaLR
"""One of them."""

__all__ = ["AnyScheduler", "ExponentialLR", "LambdaLR", "MultiStepLR", "StepLR"]
