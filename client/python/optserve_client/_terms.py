"""On which terms a client and its server have met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import Message

from optserve_client._effects import Operation, ask
from optserve_client._outages import Outages
from optserve_client.config import ClientConfig
from optserve_client.progress import TransferReporter

_Answer = TypeVar("_Answer", bound=Message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What holds for all of a client's sessions."""

    config: ClientConfig
    chunk_bytes: int
    """Most tensor bytes in one message: what both allow."""
    reporter: TransferReporter
    outages: Outages

    def ask(self, rpc: str, request: Message, answer: type[_Answer]) -> Operation[_Answer]:
        """Call an rpc that may be repeated, until it is answered; return the answer."""
        timeout_s = self.config.timeout_s
        return self.outages.persist(lambda: ask(rpc, request, answer, timeout_s))
