"""What a step in one event must hold."""

from __future__ import annotations

from optserve.v1 import optimizer_service_pb2 as pb
from optserve_server.core.errors import InvalidFieldError, LimitExceededError
from optserve_server.core.limits import Limits
from optserve_server.core.spec import SessionSpec
from optserve_server.rpc import decode, encoded


class PackedForm:
    """The form of a session's packed steps, which is worked out once."""

    def __init__(self, spec: SessionSpec, limits: Limits) -> None:
        """Work it out for the session that ``spec`` is in force for."""
        self._specs, self._encoding = spec.parameters, spec.wire.gradients
        self._byte_counts = [encoded.byte_count(each, self._encoding) for each in self._specs]
        self._answer_bytes = sum(each.byte_count for each in self._specs)
        self._bytes_max = limits.chunk_bytes_max

    def gradients(self, packed: pb.PackedStep) -> list[bytes]:
        """Return the bytes of all gradients.

        Raises:
            LimitExceededError: The session's parameters are too large for this form.
            InvalidFieldError: There are too few gradients, or too many.
            ByteCountMismatchError: One has too few bytes, or too many.
        """
        if self._answer_bytes > self._bytes_max:
            raise LimitExceededError(
                f"the parameters have {self._answer_bytes} bytes, and {self._bytes_max} may go"
                " packed; send begin, chunks and end",
                field="packed",
                expected=f"at most {self._bytes_max} bytes",
                actual=f"{self._answer_bytes} bytes",
            )
        if len(packed.gradients) != len(self._specs):
            raise InvalidFieldError(
                f"a packed step has a gradient for each of {len(self._specs)} parameters;"
                f" {len(packed.gradients)} came",
                field="gradients",
                expected=len(self._specs),
                actual=len(packed.gradients),
            )
        gradients = list(packed.gradients)  # copy: each access to a field of bytes makes one.
        if list(map(len, gradients)) != self._byte_counts:
            for i, (spec, data) in enumerate(zip(self._specs, gradients, strict=True)):
                decode.check_byte_count(spec, len(data), f"gradients[{i}]", self._encoding)
        return gradients
