"""The contract of optserve: what a client and a server promise each other.

``optserve.v1`` holds the generated messages and the service, ``reasons`` the reasons of refusals,
``wire`` how tensors become chunks and chunks become tensors, ``limits`` the numbers that both sides
must know before they have met.
"""

from __future__ import annotations

__version__ = "0.1.0"
