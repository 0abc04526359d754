"""How the benchmarks turn our knobs: the only place that knows their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.job import SkippedError
from benchmarks.model import Tensors

import optserve_client
from optserve_client import ClientConfig, Lane, Session
from optserve_server.config import Config

NOT_BUILT = "not built yet"


def wire(gradients: str, parameters: str) -> Mapping[str, Any]:
    """Return the options of a session whose tensors travel in these data types."""
    if gradients == parameters == "FP32":
        return {}
    if not hasattr(optserve_client, "Wire"):
        raise SkippedError(f"{NOT_BUILT}: reduced data types on the wire")
    asked = {"gradients": gradients, "parameters": parameters}
    encodings: dict[str, Any] = {key: each for key, each in asked.items() if each != "FP32"}
    return {"wire": optserve_client.Wire(**encodings)}


def client_config(lane: Lane) -> ClientConfig:
    """Return the configuration of a client whose tensors take this lane."""
    return ClientConfig(lane=lane)


def gradient_buffers(session: Session) -> Tensors:
    """Return the writable arrays of the shared region that a step takes without a copy."""
    return session.gradient_buffers()


def server_flags(overlap: str) -> tuple[str, ...]:
    """Return the flags of a server that overlaps: auto, on or off."""
    if "overlap" in Config.model_fields:
        return ("--overlap", overlap)
    if overlap == "on":
        raise SkippedError(f"{NOT_BUILT}: overlapped steps")
    return ()
