"""How the benchmarks turn our knobs: the only place that knows their names."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.model import Tensors

from optserve_client import ClientConfig, Durability, Lane, Session, Wire, WireEncoding

_ENCODINGS: dict[str, WireEncoding | None] = {
    "FP32": None,
    "BF16": "BF16",
    "FP16": "FP16",
    "INT8_BLOCKS": "INT8_BLOCKS",
}

_DURABILITIES = {
    "none": Durability(),
    "snapshot": Durability(mode="SNAPSHOT"),
    "journal": Durability(mode="JOURNAL"),
    "fsync": Durability(mode="JOURNAL", fsync=True),
}


def wire(options: Mapping[str, str]) -> Wire:
    """Return how a session's tensors travel: see the options ``gradients`` and ``parameters``."""
    return Wire(
        gradients=_ENCODINGS[options.get("gradients", "FP32")],
        parameters=_ENCODINGS[options.get("parameters", "FP32")],
    )


def durability(options: Mapping[str, str]) -> Durability:
    """Return how much of a session may be lost: see the option ``durability``."""
    return _DURABILITIES[options.get("durability", "none")]


def client_config(lane: Lane) -> ClientConfig:
    """Return the configuration of a client whose tensors take this lane."""
    return ClientConfig(lane=lane)


def gradient_buffers(session: Session) -> Tensors:
    """Return the writable arrays of the shared region that a step takes without a copy."""
    return session.gradient_buffers()


def server_flags(overlap: str) -> tuple[str, ...]:
    """Return the flags of a server that answers a step early: auto, on or off."""
    return ("--overlap", overlap)
