"""A step that was begun on a stream, while its gradients come."""

from __future__ import annotations

import dataclasses
import time

from optserve.wire import Chunk
from optserve_server.core.errors import InvalidFieldError
from optserve_server.core.round import Contribution
from optserve_server.rpc import transfer


class OpenStep:
    """A step that was begun, and whose gradients are coming."""

    def __init__(
        self, contribution: Contribution, receiver: transfer.Receiver | None, *, announces: bool
    ) -> None:
        """Receive a contribution.

        Args:
            contribution: What is being received.
            receiver: Takes the chunks. None: they are not needed.
            announces: Whether the answer announces the parameters.
        """
        self.announces = announces
        self.started_s = time.perf_counter()
        self.byte_count = 0
        """How many bytes have come."""
        self._contribution = contribution
        self._receiver = receiver

    def add(self, chunks: list[Chunk]) -> None:
        """Take chunks; see Receiver.add."""
        if not self._receiver:
            return
        self.byte_count += self._receiver.add(chunks)
        if self._contribution.loading:
            tensors = {chunk.tensor for chunk in chunks}
            self._contribution.loading.received(filter(self._receiver.is_complete, tensors))

    def received(self, position: int) -> int:
        """Return how many bytes of an announced gradient have come."""
        return self._receiver.received(position) if self._receiver else 0

    def finish(self, digest: bytes) -> Contribution:
        """Check that the gradients are complete, and return what was received.

        Args:
            digest: What identifies it, if that was not known at the beginning.

        Raises:
            InvalidFieldError: The digest is not the one that the step began with.
            ByteCountMismatchError: As of Receiver.finish.
        """
        if self._receiver:
            self._receiver.finish()
        begun = self._contribution.digest
        if not digest or digest == begun:
            return self._contribution
        if begun:
            raise InvalidFieldError(
                "the step ends with another digest than it began with",
                field="digest",
                expected=begun.hex(),
                actual=digest.hex(),
            )
        return dataclasses.replace(self._contribution, digest=digest)
