"""What the sessions of a server have around them."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from optserve_server.core.device import Device
from optserve_server.core.events import Observer
from optserve_server.core.persistence import Persistence


class Overlap(enum.StrEnum):
    """Whether a step is answered while its gradients still arrive."""

    AUTO = "auto"
    """Unless the client is on this host: there the processor is scarce, and not the wire."""
    ON = "on"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a session does not own: where its work runs, what time it is, and who listens."""

    device: Device
    executor: Executor
    clock: Callable[[], float]
    """Seconds since the epoch: for what people read."""
    observer: Observer
    monotonic: Callable[[], float] = time.monotonic
    """Seconds, from any beginning: for how long something takes."""
    shared_memory: bool = True
    """Whether tensors may lie in memory that clients on this host map."""
    persistence: Persistence | None = None
    """Where sessions survive. None: nowhere, and sessions are in memory only."""
    overlap: Overlap = Overlap.AUTO
    """Whether steps are answered while their gradients still arrive."""
