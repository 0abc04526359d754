"""CreateSession: decode what is asked for, and make it; once, if the request says which it is."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable

from optserve.v1 import optimizer_service_pb2 as pb
from optserve_server.core.actor import SessionActor
from optserve_server.core.beginning import Beginning
from optserve_server.core.creations import CreationRequest
from optserve_server.core.errors import LimitExceededError, SessionNotFoundError, within
from optserve_server.core.events import Direction
from optserve_server.core.limits import Limits
from optserve_server.core.tenant import TenantRegistry
from optserve_server.rpc import decode_spec, encode

_LOGGER = logging.getLogger(__name__)


async def create(request: pb.CreateSessionRequest, registry: TenantRegistry) -> SessionActor:
    """Create the session that a request asks for, or find the one that it has made already.

    Raises:
        RequestConflictError: The request's id belongs to another request.
        OptserveError: The session cannot be made. Nothing was changed.
    """
    limits = registry.limits
    spec = decode_spec.session_spec(request.spec, limits)
    encode.check_fits(spec, limits, "spec.parameters")
    values = decode_spec.values(request.values, spec, limits)

    async def make(wanted: CreationRequest | None) -> SessionActor:
        with within("spec"):
            actor = await registry.create(Beginning(spec=spec, values=values), wanted)
        if values:
            byte_count = sum(value.nbytes for value in values.values())
            registry.surroundings.observer.bytes_moved(Direction.RECEIVED, byte_count)
        log_created(actor, "session created")
        return actor

    return await once(request, registry, make)


async def once(
    request: pb.CreateSessionRequest | pb.RestoreCheckpointRequest,
    registry: TenantRegistry,
    make: Callable[[CreationRequest | None], Awaitable[SessionActor]],
) -> SessionActor:
    """Return the session that a request makes, or has made already if it has an id.

    Args:
        request: What has come.
        registry: Where the session is.
        make: Makes it, to be known by what it is given.

    Raises:
        RequestConflictError: The request's id belongs to another request.
        OptserveError: As of ``make``.
    """
    if not request.request_id:
        return await make(None)
    wanted = _identified(request, registry.tenant, registry.limits)

    async def made() -> str:
        return (await make(wanted)).session_id

    try:
        return await registry.find(await registry.creations.once(wanted, made))
    except SessionNotFoundError:  # It was being deleted, and is forgotten by now.
        return await registry.find(await registry.creations.once(wanted, made))


def log_created(actor: SessionActor, what: str) -> None:
    """Note in the log that there is a new session."""
    spec = actor.spec
    _LOGGER.info(
        what,
        extra={
            "session": actor.session_id,
            "tenant": actor.opened.tenant,
            "optimizer": spec.optimizer.kind,
            "parameters": len(spec.parameters),
            "workers": spec.workers,
            "durability": spec.durability.mode,
            "reserved_bytes": actor.reserved_bytes,
        },
    )


def _identified(
    request: pb.CreateSessionRequest | pb.RestoreCheckpointRequest, tenant: str, limits: Limits
) -> CreationRequest:
    """Return what a request is known again by.

    Raises:
        LimitExceededError: Its id is too long.
    """
    request_id = request.request_id
    count = len(request_id.encode())
    if count > limits.request_id_bytes_max:
        raise LimitExceededError(
            f"a request's id has {count} bytes; {limits.request_id_bytes_max} are allowed",
            field="request_id",
            expected=f"at most {limits.request_id_bytes_max} bytes",
            actual=f"{count} bytes",
        )
    content = request.SerializeToString(deterministic=True)  # With the id, which is equal too.
    return CreationRequest(
        tenant=tenant, request_id=request_id, digest=hashlib.sha256(content).digest()
    )
