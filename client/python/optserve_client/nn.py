"""Losses, by torch.nn's names, arguments and defaults: ``nn.MSELoss()``.

``reduction`` is one of ``Reduction``; ``weight`` is made by ``optserve_client.tensor``.
"""

from __future__ import annotations

from typing import TypeAlias

from optserve.v1.loss_pb2 import (
    BCELoss,
    CrossEntropyLoss,
    KLDivLoss,
    L1Loss,
    MSELoss,
    NLLLoss,
    Reduction,
)

AnyLoss: TypeAlias = NLLLoss | CrossEntropyLoss | BCELoss | KLDivLoss | MSELoss | L1Loss
"""One of them."""

__all__ = [
    "AnyLoss",
    "BCELoss",
    "CrossEntropyLoss",
    "KLDivLoss",
    "L1Loss",
    "MSELoss",
    "NLLLoss",
    "Reduction",
]
