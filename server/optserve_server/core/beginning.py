"""What a new session begins with: values for its parameters, or all that another one was."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from optserve_server.core.admission import session_bytes
from optserve_server.core.device import Device
from optserve_server.core.limits import Limits
from optserve_server.core.session import Session
from optserve_server.core.spec import SessionSpec
from optserve_server.core.state import SessionState


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """A spec, with values of parameters, by position, or with a whole state."""

    spec: SessionSpec
    values: Mapping[int, Tensor] | None = None
    state: SessionState | None = None
    """To go on from; the spec is the state's."""
    stepped_s: float | None = None
    """When the state's last step was applied, in seconds since the epoch."""

    @property
    def field(self) -> str:
        """The field that asks for the memory, for errors."""
        return "name" if self.state else "parameters"

    def measure(self, device: Device, limits: Limits) -> int:
        """Return how much memory a session takes, after a look at everything else about it.

        Raises:
            CallerError: torch does not take the spec.
        """
        spec = self.spec
        if self.state is None:  # The spec of a state has been looked at, under limits of its time.
            parameters = tuple(dataclasses.replace(each, shape=(0,)) for each in spec.parameters)
            Session(dataclasses.replace(spec, parameters=parameters), Device("cpu"), limits)
        return session_bytes(spec, device.torch)

    def session(self, device: Device, limits: Limits) -> Session:
        """Return the session, whose memory is reserved.

        Raises:
            CallerError: torch does not take the spec.
            ValueError: The state is none of such a session.
        """
        if self.state is not None:
            return Session.restored(self.state, device, limits)
        session = Session(self.spec, device, limits)
        if self.values:
            session.set_parameters(self.values)
        return session
