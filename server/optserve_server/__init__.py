"""The optserve server.

Sessions that keep parameters, optimizer state, schedules and losses, served over gRPC.
"""

from __future__ import annotations

__version__ = "0.1.0"
