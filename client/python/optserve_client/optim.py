"""Optimizers, by torch.optim's names, arguments and defaults: ``optim.Adam(lr=1e-3)``.

These are the contract's own messages: an argument that is not given is torch's default, a misspelt
one is refused when the message is made.
"""

from __future__ import annotations

from typing import TypeAlias

from optserve.v1.optimizer_pb2 import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, RMSprop

AnyOptimizer: TypeAlias = SGD | Adam | AdamW | RMSprop | Adadelta | Adagrad | Adamax
"""One of them."""

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "AnyOptimizer",
    "RMSprop",
]
