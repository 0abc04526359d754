"""How the channels of both faces are set up, and the stubs that call through them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Generic, TypeVar, overload

import grpc
from google.protobuf.message_factory import GetMessageClass

from optserve.codec import codec_of
from optserve.limits import MESSAGE_BYTES_MAX
from optserve.v1.optimizer_service_pb2 import DESCRIPTOR
from optserve.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from optserve_client._credentials import Metadata
from optserve_client.config import ClientConfig

if TYPE_CHECKING:  # A name of the stubs only.
    from optserve.v1.optimizer_service_pb2_grpc import OptimizerServiceAsyncStub

_OPTIONS: tuple[tuple[str, int | str], ...] = (
    # gRPC's defaults, written down: finite both ways, for whoever lifts them lifts the protection
    # against bombs too.
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    # A pool of its own, so that a failed connection of one client does not make the next one wait
    # for its backoff.
    ("grpc.use_local_subchannel_pool", 1),
    # Fewer, larger reads: a chunk of 1 MiB would otherwise come in many pieces.
    ("grpc.experimental.tcp_read_chunk_size", 1 << 20),
    ("grpc.experimental.tcp_max_read_chunk_size", 4 << 20),
    ("grpc.primary_user_agent", f"optserve-python/{version('optserve-client')}"),
)
"""Of every channel. Compression is off, which is gRPC's default: gradients do not compress."""

_PING_TIMEOUT_S_MAX = 20.0  # gRPC's own; what is on its way must be through before the answer.
CLOSE_TIMEOUT_S = 2.0  # For the server to end a stream that we have half-closed; then we cancel it.

_Stub_co = TypeVar("_Stub_co", covariant=True)

_SERVICE = DESCRIPTOR.services_by_name["OptimizerService"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line(Generic[_Stub_co]):
    """A way to the server, for any number of calls."""

    stub: _Stub_co
    target: str
    metadata: Callable[[], Metadata]
    """Of the next call."""


def channel_options(config: ClientConfig) -> list[tuple[str, int | str]]:
    """Return the options of a channel."""
    # gRPC connects again at its own pace, and until then every attempt of ours fails at once: it
    # must not be the slower one.
    first_ms, max_ms = (
        max(1, round(1000 * each)) for each in (config.retry.backoff_s, config.retry.backoff_max_s)
    )
    ping_timeout_ms = round(1000 * min(config.keepalive_s, _PING_TIMEOUT_S_MAX))
    return [
        *_OPTIONS,
        ("grpc.initial_reconnect_backoff_ms", first_ms),
        ("grpc.max_reconnect_backoff_ms", max(first_ms, max_ms)),
        ("grpc.keepalive_time_ms", round(1000 * config.keepalive_s)),
        # The one is of no use without the other, which is a minute.
        ("grpc.keepalive_timeout_ms", ping_timeout_ms),
        ("grpc.http2.ping_timeout_ms", ping_timeout_ms),
    ]


@overload
def stub_of(channel: grpc.Channel) -> OptimizerServiceStub: ...
@overload
def stub_of(channel: grpc.aio.Channel) -> OptimizerServiceAsyncStub: ...
def stub_of(
    channel: grpc.Channel | grpc.aio.Channel,
) -> OptimizerServiceStub | OptimizerServiceAsyncStub:
    """Return the stub of a channel, whose streams of tensors take and give lists of chunks."""
    stub = OptimizerServiceStub(channel)
    for method in _SERVICE.methods:
        encoder, decoder = codec_of(method.input_type), codec_of(method.output_type)
        if not (encoder or decoder):
            continue
        kind = ("stream" if method.client_streaming else "unary") + (
            "_stream" if method.server_streaming else "_unary"
        )
        request, response = map(GetMessageClass, (method.input_type, method.output_type))
        call = getattr(channel, kind)(
            f"/{_SERVICE.full_name}/{method.name}",
            request_serializer=encoder.encode if encoder else request.SerializeToString,
            response_deserializer=decoder.decode if decoder else response.FromString,
        )
        setattr(stub, method.name, call)
    return stub
