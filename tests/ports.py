"""Ports at which one server after the other is to be found; nobody else gets them in between."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# Who asks a system for any port gets one above: 32768 and more on Linux, 49152 elsewhere.
_PORTS = range(32_767, 1_023, -1)
_CLAIMS_HOST = "127.0.0.2"  # Whoever runs tests on this host beside us takes the port here first.


@contextmanager
def kept_port() -> Iterator[int]:
    """Keep a port of 127.0.0.1 for a block, to be listened on, left, and listened on again."""
    with ExitStack() as stack:
        yield next(port for port in _PORTS if _is_claimed(port, stack))


def _is_claimed(port: int, stack: ExitStack) -> bool:
    """Claim a port until the stack is closed; return whether it was free."""
    claim = stack.enter_context(socket.socket())
    try:
        claim.bind((_CLAIMS_HOST, port))
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # As a server does it.
            probe.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True
