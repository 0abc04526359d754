"""UploadParameters and DownloadParameters."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.wire import Chunk
from optserve_server.core.actor import SessionActor
from optserve_server.core.admission import transfer_bytes
from optserve_server.core.errors import (
    InvalidNameError,
    MissingFieldError,
    UnknownNameError,
)
from optserve_server.core.events import Direction
from optserve_server.core.tenant import TenantRegistry
from optserve_server.rpc import decode, encode, transfer

_Context = grpc.aio.ServicerContext[Any, Any]


async def upload(
    requests: AsyncIterator[pb.UploadParametersRequest | list[Chunk]], registry: TenantRegistry
) -> SessionActor:
    """Receive values of parameters, then set them all at once; return the session.

    Raises:
        OptserveError: Something about it is not allowed. Nothing was changed.
    """
    limits, observer = registry.limits, registry.surroundings.observer
    begin = (await transfer.first(requests, "an upload", "begin", limits)).begin
    actor = await registry.find(begin.session_id)
    specs = decode.tensor_specs(begin.parameters, limits, "begin.parameters")
    if not specs:
        raise MissingFieldError(
            "the upload announces no parameter", field="begin.parameters", expected="a parameter"
        )
    positions = actor.positions.of(specs, "begin.parameters")
    count = sum(spec.byte_count for spec in specs)
    with (
        # Or sessions that fill the memory would wait for ever for each other's uploads.
        actor.spare.lent(idle=actor.awaits_values) as lent,
        registry.budget.reserved(
            0 if lent else transfer_bytes(specs), what="the upload", field="begin.parameters"
        ),
    ):
        values = [registry.surroundings.device.staging(spec) for spec in specs]
        targets = transfer.buffers(values)
        receiver = transfer.Receiver(targets, "begin.parameters[{}]".format, limits)
        with actor.in_use():
            async with transfer.on_the_whole(count, limits):
                await transfer.receive(requests, receiver, limits)
        observer.bytes_moved(Direction.RECEIVED, count)
        await actor.set_parameters(dict(zip(positions, values, strict=True)))
    return actor


async def download(
    request: pb.DownloadParametersRequest, context: _Context, registry: TenantRegistry
) -> None:
    """Send values of parameters as they are between two steps.

    Raises:
        OptserveError: The session has not all of them.
    """
    limits, observer = registry.limits, registry.surroundings.observer
    actor = await registry.find(request.session_id)
    actor.session.check_ready()
    specs = actor.session.spec.parameters
    if len(request.names) > len(specs) or len(set(request.names)) < len(request.names):
        raise InvalidNameError(
            "a parameter is asked for twice", field="names", expected="each parameter once at most"
        )
    positions = [_position(actor, name, i) for i, name in enumerate(request.names)] or range(
        len(specs)
    )

    async def write(chunks: list[Chunk]) -> None:
        actor.check_open()
        await context.write(chunks)

    size = sum(specs[i].byte_count for i in positions)
    async with actor.reading() as parameters, transfer.on_the_whole(size, limits):
        begin = pb.DownloadBegin(
            steps=actor.view.steps,
            parameters=[encode.tensor_header(specs[i]) for i in positions],
        )
        await transfer.in_time(context.write(pb.DownloadParametersResponse(begin=begin)), limits)
        sources = transfer.buffers(parameters[i] for i in positions)
        count = await transfer.send(sources, write, limits)
    observer.bytes_moved(Direction.SENT, count)


def _position(actor: SessionActor, name: str, i: int) -> int:
    position = actor.positions.get(name)
    if position is None:
        raise UnknownNameError(
            f"the session has no parameter {name!r}",
            field=f"names[{i}]",
            expected="a parameter of the session",
            actual=name,
        )
    return position
