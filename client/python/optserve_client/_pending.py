"""A step between the moment at which it is wanted and the one at which it is answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.tensor_pb2 import TensorHeader


@dataclass(slots=True, kw_only=True)
class PendingStep:
    """A step that is to be taken, and how far it is known to have come."""

    number: int
    headers: Sequence[TensorHeader]
    """Of the parameters that have a gradient, in the session's order."""
    tensors: Sequence[memoryview] = ()
    """Their gradients' bytes. Must not change until the step is over."""
    digest: bytes = b""
    """What identifies it. Empty: that is not known before all of it has been sent."""
    is_unknown: bool = False
    """Whether all of it has been sent, and nobody knows what became of it."""
    has_arrived: bool = False
    """Whether the server has said that it has all of it: so it need not be sent again."""
    exposed_to: bytes = b""
    """The token of the shared memory in which the server may have used up gradients that are
    nowhere else. Empty: there are none."""

    reached_s: float | None = None
    """When the present attempt found the stream open, or opened it; see Outages.persist."""

    def look_for(self, contribution: pb.Contribution) -> None:
        """Learn what the server has of the worker, from a stream that has just been opened."""
        known = bool(self.digest) and contribution.step == self.number
        self.has_arrived = known and contribution.digest == self.digest
        self.is_unknown &= self.has_arrived
