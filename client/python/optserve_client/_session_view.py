"""What both faces show of a session without asking the server."""

from __future__ import annotations

from optserve.v1.session_pb2 import SessionSpec
from optserve_client._session_operations import SessionOperations
from optserve_client.results import Parameters


class SessionView:
    """What is known here of a session."""

    def __init__(self, operations: SessionOperations) -> None:
        self._operations = operations

    @property
    def session_id(self) -> str:
        """What other clients join the session by."""
        return self._operations.session_id

    @property
    def worker(self) -> int:
        """Which of the session's workers this is, from 0."""
        return self._operations.worker

    @property
    def spec(self) -> SessionSpec:
        """What is in force, with every default filled in, as of the last answer that told."""
        return self._operations.spec

    @property
    def parameters(self) -> Parameters:
        """The newest values that are known here: read-only arrays, in the session's order.

        Valid until the next step, which may write to the same memory: copy what is to be kept.

        Raises:
            ParametersNotSetError: Nothing has been downloaded or uploaded yet.
        """
        return self._operations.parameters

    @property
    def steps(self) -> int:
        """How many steps are known here to have been applied."""
        return self._operations.steps

    @property
    def epochs(self) -> int:
        """How many epochs are known here to have been ended."""
        return self._operations.epochs

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.session_id} worker={self.worker} steps={self.steps}>"
