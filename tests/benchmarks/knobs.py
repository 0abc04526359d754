"""How the benchmarks turn our knobs: the only place that knows their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.job import SkippedError
from benchmarks.model import Tensors

import optserve_client
from optserve_client import ClientConfig, Session
from optserve_server.config import Config

NOT_BUILT = "not built yet"


def wire(gradients: str, parameters: str) -> Mapping[str, Any]:
    """Return the options of a session whose tensors travel in these data types."""
    if gradients == parameters == "FP32":
        return {}
    if not hasattr(optserve_client, "Wire"):
        raise SkippedError(f"{NOT_BUILT}: reduced data types on the wire")
    return {"wire": optserve_client.Wire(gradients=gradients, parameters=parameters)}


def client_config(lane: str) -> ClientConfig:
    """Return the configuration of a client whose tensors take this lane: grpc, shm or auto."""
    if "lane" in {field.name for field in dataclasses.fields(ClientConfig)}:
        options: dict[str, Any] = {"lane": lane}
        return ClientConfig(**options)
    if lane == "shm":
        raise SkippedError(f"{NOT_BUILT}: the shared memory lane")
    return ClientConfig()


def gradient_buffers(session: Session) -> Tensors:
    """Return the writable arrays of the shared region that a step takes without a copy."""
    buffers: Tensors = session.gradient_buffers()  # type: ignore[attr-defined]
    return buffers


def server_flags(overlap: str) -> tuple[str, ...]:
    """Return the flags of a server that overlaps: auto, on or off."""
    if "overlap" in Config.model_fields:
        return ("--overlap", overlap)
    if overlap == "on":
        raise SkippedError(f"{NOT_BUILT}: overlapped steps")
    return ()
