"""CreateSession: decode what is asked for, and make it; once, if the request says which it is."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping

from torch import Tensor

from optserve.v1 import optimizer_service_pb2 as pb
from optserve_server.core.actor import SessionActor
from optserve_server.core.creations import CreationRequest
from optserve_server.core.errors import LimitExceededError, within
from optserve_server.core.events import Direction
from optserve_server.core.limits import Limits
from optserve_server.core.spec import SessionSpec
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
    if not request.request_id:
        return await _create(spec, values, None, registry)
    wanted = _identified(request, registry.tenant, limits)

    async def made() -> str:
        return (await _create(spec, values, wanted, registry)).session_id

    return await registry.find(await registry.creations.once(wanted, made))


async def _create(
    spec: SessionSpec,
    values: Mapping[int, Tensor],
    request: CreationRequest | None,
    registry: TenantRegistry,
) -> SessionActor:
    """Create a session with values for its parameters."""
    with within("spec"):
        actor = await registry.create(spec, values, request)
    if values:
        byte_count = sum(value.nbytes for value in values.values())
        registry.surroundings.observer.bytes_moved(Direction.RECEIVED, byte_count)
    _LOGGER.info(
        "session created",
        extra={
            "session": actor.session_id,
            "tenant": registry.tenant,
            "optimizer": spec.optimizer.kind,
            "parameters": len(spec.parameters),
            "workers": spec.workers,
            "durability": spec.durability.mode,
            "reserved_bytes": actor.reserved_bytes,
        },
    )
    return actor


def _identified(request: pb.CreateSessionRequest, tenant: str, limits: Limits) -> CreationRequest:
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
