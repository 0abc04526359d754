"""The offer of shared memory: to whom it is made, and what it says."""

from __future__ import annotations

import ipaddress
import logging
import os
from urllib.parse import unquote

from optserve.v1 import optimizer_service_pb2 as pb
from optserve_server.core.actor import SessionActor
from optserve_server.core.errors import MemoryExhaustedError
from optserve_server.core.region import Region, RegionUnavailableError
from optserve_server.core.spec import Wire
from optserve_server.core.tenant import TenantRegistry

_LOGGER = logging.getLogger(__name__)

FEATURE = "shared-memory"
"""Name among the server's features."""


async def offer(
    registry: TenantRegistry, actor: SessionActor, worker: int, peer: str
) -> pb.SharedMemory | None:
    """Return what tells an attached worker where its tensors are; None if they are to travel.

    Args:
        registry: Of the session.
        actor: The session.
        worker: Who has asked.
        peer: Where from, as gRPC names it.

    Raises:
        SessionDeletedError: The session was deleted meanwhile.
    """
    if not registry.surroundings.shared_memory or not is_local(peer):
        return None
    if actor.spec.wire != Wire():
        return None  # What a session computes must not depend on where its workers are.
    # While the parameters move, one of them at a time is in both places.
    count = max(spec.byte_count for spec in actor.spec.parameters)
    try:
        with registry.budget.reserved(count, what="the move", field="open.shared_memory"):
            shared = await actor.share(worker)
    except (RegionUnavailableError, MemoryExhaustedError) as error:
        _LOGGER.info(
            "memory is not shared", extra={"session": actor.session_id, "cause": str(error)}
        )
        return None
    return pb.SharedMemory(
        process=os.getpid(),
        parameters=_region(shared.parameters),
        gradients=_region(shared.gradients),
    )


def is_local(peer: str) -> bool:
    """Return whether a peer, as gRPC names it, comes over loopback or a Unix socket.

    A proxy or a tunnel on this host speaks for clients elsewhere: that a client really is here it
    shows by opening the file.
    """
    kind, _, address = unquote(peer).partition(":")
    if kind in ("unix", "unix-abstract"):
        return True
    if kind not in ("ipv4", "ipv6"):
        return False
    host = address.rpartition(":")[0].strip("[]")
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def _region(region: Region) -> pb.SharedRegion:
    return pb.SharedRegion(
        descriptor=region.descriptor, token=region.token, byte_count=region.byte_count
    )
