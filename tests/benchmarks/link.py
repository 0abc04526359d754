"""A network between two namespaces of this machine that carries only so many bits in a second.

Two network namespaces, joined by a pair of virtual Ethernet devices, with a token bucket filter at
either end: what runs in one sees the other as another machine, at the far side of a slow cable.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.arena import Place
from benchmarks.job import SkippedError

_SERVER_ADDRESS, _CLIENT_ADDRESS = "10.217.83.1", "10.217.83.2"

# The filter lets so much pass at once. It must hold the largest packet, 64 KiB before the device
# cuts it, and be small beside a step's 100 MB: two thousandths.
_BURST = "256kb"
_QUEUE = "20ms"  # How long a packet may wait in the filter before it is dropped.


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The two ends of a capped link."""

    bits_per_s: float
    place: Place
    server_interface: str
    client_interface: str

    def seconds_for(self, byte_count: int) -> float:
        """Return how long so many bytes take in one direction at line rate."""
        return 8 * byte_count / self.bits_per_s


@contextmanager
def capped_link(bits_per_s: float) -> Iterator[Link]:
    """Lay a link for as long as the block runs; then nothing of it is left.

    Raises:
        SkippedError: This process may not, or this system cannot.
    """
    if sys.platform != "linux" or not all(map(shutil.which, ("ip", "tc"))):
        raise SkippedError("a capped link needs Linux with ip and tc (iproute2)")
    if os.geteuid() != 0:
        raise SkippedError("a capped link needs root: network namespaces and traffic control")
    server, client = (f"bench-{end}-{os.getpid()}" for end in ("server", "client"))
    # The kernel takes 15 characters for the name of an interface.
    server_interface, client_interface = (f"bs{os.getpid()}", f"bc{os.getpid()}")
    try:
        _run("ip", "netns", "add", server)
        _run("ip", "netns", "add", client)
        _run(
            *("ip", "link", "add", server_interface, "netns", server, "type", "veth"),
            *("peer", "name", client_interface, "netns", client),
        )
        _connect(server, server_interface, _SERVER_ADDRESS, bits_per_s)
        _connect(client, client_interface, _CLIENT_ADDRESS, bits_per_s)
        yield Link(
            bits_per_s=bits_per_s,
            place=Place(
                host=_SERVER_ADDRESS,
                server_prefix=("ip", "netns", "exec", server),
                client_prefix=("ip", "netns", "exec", client),
            ),
            server_interface=server_interface,
            client_interface=client_interface,
        )
    finally:
        # With a namespace its devices go; one that was never made is no problem.
        for namespace in (server, client):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _connect(namespace: str, interface: str, address: str, bits_per_s: float) -> None:
    within = ("ip", "-n", namespace)
    _run(*within, "link", "set", "lo", "up")
    _run(*within, "address", "add", f"{address}/30", "dev", interface)
    _run(*within, "link", "set", interface, "up")
    _run(
        *("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", "tbf"),
        *("rate", f"{bits_per_s:.0f}bit", "burst", _BURST, "latency", _QUEUE),
    )


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SkippedError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
