"""On which terms a client and its server have met."""

from __future__ import annotations

from dataclasses import dataclass

from optserve_client.config import ClientConfig
from optserve_client.progress import TransferReporter


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What holds for all of a client's sessions."""

    config: ClientConfig
    chunk_bytes: int
    """Most tensor bytes in one message: what both allow."""
    reporter: TransferReporter
