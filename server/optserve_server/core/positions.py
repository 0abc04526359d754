"""Where parameters stand in a session, by their names."""

from __future__ import annotations

from collections.abc import Sequence

from optserve_server.core.errors import UnknownNameError
from optserve_server.core.tensors import TensorSpec, check_fits


class Positions:
    """The positions of a session's parameters."""

    def __init__(self, parameters: Sequence[TensorSpec]) -> None:
        """Take the positions from the order of ``parameters``."""
        self._parameters = parameters
        self._by_name = {parameter.name: i for i, parameter in enumerate(parameters)}

    def get(self, name: str) -> int | None:
        """Return which parameter has the name; None if none has."""
        return self._by_name.get(name)

    def of(self, tensors: Sequence[TensorSpec], field: str) -> list[int]:
        """Return which parameters the announced tensors belong to.

        Args:
            tensors: As they were announced; their names are unique.
            field: Path of the list that they came in.

        Raises:
            CallerError: A name is unknown, or a shape or dtype is not the parameter's.
        """
        return [self._of_one(tensor, f"{field}[{i}]") for i, tensor in enumerate(tensors)]

    def _of_one(self, tensor: TensorSpec, field: str) -> int:
        position = self._by_name.get(tensor.name)
        if position is None:
            raise UnknownNameError(
                f"the session has no parameter {tensor.name!r}",
                field=f"{field}.name",
                expected="a parameter of the session",
                actual=tensor.name,
            )
        check_fits(tensor, self._parameters[position], field)
        return position
