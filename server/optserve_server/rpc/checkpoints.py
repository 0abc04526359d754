"""Checkpoints: saved, listed, restored as new sessions, downloaded as files, deleted."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import grpc
from google.protobuf.json_format import MessageToJson
from torch import Tensor

from optserve.v1 import checkpoint_pb2
from optserve.v1 import optimizer_service_pb2 as pb
from optserve_server.core.actor import SessionActor
from optserve_server.core.beginning import Beginning
from optserve_server.core.checkpoints import Opened, Saved
from optserve_server.core.creations import CreationRequest
from optserve_server.core.events import Direction
from optserve_server.core.safetensors import encode_tensors
from optserve_server.core.state import SessionState
from optserve_server.core.tenant import TenantRegistry
from optserve_server.rpc import create, decode, encode, transfer

_Context = grpc.aio.ServicerContext[Any, Any]

_LOGGER = logging.getLogger(__name__)
_PAGE_MAX = 100


async def save(
    request: pb.SaveCheckpointRequest, registry: TenantRegistry
) -> pb.SaveCheckpointResponse:
    """Save a session under a name.

    Raises:
        OptserveError: It cannot be saved, or not under this name. Nothing was changed.
    """
    actor = await registry.find(request.session_id)
    decode.check_name(request.name, registry.limits, "name")
    saved = await registry.save_checkpoint(actor, request.name)
    _log("checkpoint saved", saved, registry)
    return pb.SaveCheckpointResponse(checkpoint=_checkpoint(saved))


async def page(
    request: pb.ListCheckpointsRequest, registry: TenantRegistry
) -> pb.ListCheckpointsResponse:
    """List checkpoints, the oldest first."""
    after, count = decode.page(request.page_size, request.page_token, _PAGE_MAX)
    found, next_after = await registry.checkpoint_page(request.session_id, after=after, count=count)
    return pb.ListCheckpointsResponse(
        checkpoints=[_checkpoint(saved) for saved in found],
        next_page_token="" if next_after is None else str(next_after),
    )


async def restore(request: pb.RestoreCheckpointRequest, registry: TenantRegistry) -> SessionActor:
    """Make a session that goes on from a checkpoint, or find the one that the request has made.

    Raises:
        OptserveError: There is no such checkpoint, or no room for the session. Nothing was changed.
    """
    limits = registry.limits
    changed: Mapping[str, Any] = {}
    if request.HasField("display_name"):
        changed = {
            "display_name": decode.display_name(request.display_name, limits, "display_name")
        }

    async def make(wanted: CreationRequest | None) -> SessionActor:
        async with registry.opened_checkpoint(request.session_id, request.name) as opened:
            spec = dataclasses.replace(opened.state.spec, **changed)
            encode.check_fits(spec, limits, "name")
            state = dataclasses.replace(opened.state, spec=spec)
            beginning = Beginning(spec=spec, state=state, stepped_s=opened.stepped_s)
            actor = await registry.create(beginning, wanted)
        create.log_created(actor, "session restored")
        return actor

    return await create.once(request, registry, make)


async def download(
    request: pb.DownloadCheckpointRequest, context: _Context, registry: TenantRegistry
) -> None:
    """Send a checkpoint as a file.

    Raises:
        OptserveError: There is no such checkpoint, or no memory to read it.
    """
    limits = registry.limits
    async with registry.opened_checkpoint(request.session_id, request.name) as opened:
        pieces = encode_tensors(_tensors(opened.state), _metadata(opened))
        size = sum(len(piece) for piece in pieces)
        begin = pb.CheckpointBegin(checkpoint=_checkpoint(opened.saved), byte_count=size)
        async with transfer.on_the_whole(size, limits):
            first = pb.DownloadCheckpointResponse(begin=begin)
            await transfer.in_time(context.write(first), limits)
            for data in _chunks(pieces, limits.chunk_bytes_max):
                response = pb.DownloadCheckpointResponse(data=data)
                await transfer.in_time(context.write(response), limits)
    registry.surroundings.observer.bytes_moved(Direction.SENT, size)


async def delete(
    request: pb.DeleteCheckpointRequest, registry: TenantRegistry
) -> pb.DeleteCheckpointResponse:
    """Delete a checkpoint.

    Raises:
        OptserveError: There is no such checkpoint.
    """
    deleted = await registry.delete_checkpoint(request.session_id, request.name)
    _log("checkpoint deleted", deleted, registry)
    return pb.DeleteCheckpointResponse(checkpoint=_checkpoint(deleted))


def _checkpoint(saved: Saved) -> checkpoint_pb2.Checkpoint:
    return checkpoint_pb2.Checkpoint(
        session_id=saved.session_id,
        name=saved.name,
        steps=saved.steps,
        epochs=saved.epochs,
        optimizer=saved.optimizer,
        parameter_count=saved.parameter_count,
        byte_count=saved.byte_count,
        create_time=encode.timestamp(saved.created_s) if saved.created_s else None,
        torch_version=saved.torch,
        device=saved.device,
    )


def _tensors(state: SessionState) -> dict[str, Tensor]:
    """Return the tensors of a state by their names in a file."""
    parameters = state.spec.parameters
    named = {f"parameters/{parameters[i].name}": value for i, value in state.parameters.items()}
    for name, values in _kept(state):
        for key, value in values.items():
            if isinstance(value, Tensor):
                named[f"optimizer/{name}/{key}"] = value
    return named


def _metadata(opened: Opened) -> dict[str, str]:
    """Return what else a file says; see CheckpointBegin."""
    state = opened.state
    groups = zip(state.spec.groups, state.optimizer_groups, strict=True)
    numbers = {
        name: {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        for name, values in _kept(state)
    }
    return {
        "checkpoint": MessageToJson(_checkpoint(opened.saved), indent=None),
        "spec": MessageToJson(encode.session_spec(state.spec), indent=None),
        "rates": json.dumps({group.name: values["lr"] for group, values in groups}),
        "numbers": json.dumps({name: values for name, values in numbers.items() if values}),
    }


def _kept(state: SessionState) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield what the optimizer keeps, by the names of the parameters."""
    places = [i for group in state.spec.groups for i in group.parameters]
    for place, values in state.optimizer_state.items():
        yield state.spec.parameters[places[place]].name, values


def _chunks(pieces: Iterable[memoryview | bytes], size: int) -> Iterator[bytes]:
    """Yield the bytes of all pieces, ``size`` at a time."""
    gathered: list[memoryview] = []
    room = size
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            gathered.append(rest[:room])
            rest = rest[room:]
            room -= len(gathered[-1])
            if room == 0:
                yield b"".join(gathered)
                gathered, room = [], size
    if gathered:
        yield b"".join(gathered)


def _log(what: str, saved: Saved, registry: TenantRegistry) -> None:
    _LOGGER.info(
        what,
        extra={
            "session": saved.session_id,
            "tenant": registry.tenant,
            "checkpoint": saved.name,
            "steps": saved.steps,
            "bytes": saved.byte_count,
        },
    )
