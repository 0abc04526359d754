"""The gRPC server: the service, its health and its reflection, on one port."""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from optserve.v1 import optimizer_service_pb2
from optserve.v1.optimizer_service_pb2_grpc import add_OptimizerServiceServicer_to_server
from optserve_server.core.limits import WINDOW_BYTES
from optserve_server.core.registry import SessionRegistry
from optserve_server.core.traffic import Traffic
from optserve_server.rpc.access import Access
from optserve_server.rpc.gate import Gate
from optserve_server.rpc.interceptor import Boundary
from optserve_server.rpc.listening import listen
from optserve_server.rpc.servicer import OptimizerServicer

SERVICE = optimizer_service_pb2.DESCRIPTOR.services_by_name["OptimizerService"]
"""The service's descriptor."""

# A connection that is no HTTP/2 connection by then is closed.
_HANDSHAKE_TIMEOUT_S = 20.0
# Clients connect again by themselves, and notice nothing.
_CONNECTION_IDLE_MS = 10 * 60_000
# Health, reflection and calls that are being refused come beside those that the limits count.
_CALLS_BESIDE = 1_000
# What a connection keeps to read into, also when nothing comes; by itself up to twice what came at
# once, which nothing bounds. A chunk is read at once.
_READ_BUFFER_BYTES = 1 << 20
# Bit of grpc's "identity" algorithm: tensors do not compress, and bombs do.
_NO_COMPRESSION = 1 << 0
_KEEPALIVE_MS = 60_000
_REFLECTION = "grpc.reflection.{}.ServerReflection"


class _Vanished(logging.Filter):
    """Passes over what grpc logs, with a traceback, of each client that has gone in mid-answer.

    Whoever wants to know how many they are finds them in ``grpc_server_handled_total``.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return type(error).__name__ != "ExecuteBatchError"  # grpc does not export it.


_VANISHED = _Vanished()


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc, name-defined] # untyped
    """grpcio's health service, with the List that it lacks; watches end with the server."""

    def __init__(self) -> None:
        super().__init__()
        self._watches: set[asyncio.Task[Any]] = set()
        self._ended = False

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Tell a service's status whenever it changes, until the server stops."""
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        try:
            await super().Watch(request, context)
        except asyncio.CancelledError:
            if not self._ended:  # The client has gone.
                raise
        finally:
            self._watches.discard(task)

    def end_watches(self) -> None:
        """End every watch, or the server would wait for those who watch it stop."""
        self._ended = True
        for task in self._watches:
            task.cancel()

    async def List(
        self, request: health_pb2.HealthListRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthListResponse:
        """Return the status of every service."""
        statuses = {
            name: health_pb2.HealthCheckResponse(status=status)
            for name, status in self._server_status.items()
        }
        return health_pb2.HealthListResponse(statuses=statuses)


class Server:
    """The gRPC server of one registry."""

    def __init__(
        self,
        registry: SessionRegistry,
        access: Access | None = None,
        *,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        """Build the server. Made on the event loop.

        Args:
            registry: What is served.
            access: Asks who calls. None: nobody does.
            window_bytes: How much of a call may come before anybody reads it.
        """
        access = access or Access()
        limits, observer = registry.limits, registry.surroundings.observer
        handshake_timeout_s = min(limits.stall_timeout_s, _HANDSHAKE_TIMEOUT_S)
        calls_max = limits.streams_max + limits.calls_max + _CALLS_BESIDE
        self._health = HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[
                Boundary(
                    SERVICE,
                    access,
                    observer,
                    Traffic(limits, registry.surroundings.monotonic),
                    limits,
                ),
                Gate(SERVICE.full_name, access, observer),
            ],
            options=[
                ("grpc.max_receive_message_length", limits.message_bytes_max),
                ("grpc.max_send_message_length", limits.message_bytes_max),
                ("grpc.compression_enabled_algorithms_bitset", _NO_COMPRESSION),
                # Or two servers share a port, and sessions vanish at random.
                ("grpc.so_reuseport", 0),
                # By itself gRPC takes 4 to 16 MiB of each stream before anybody reads it, admitted
                # or not, and whatever a message may have.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", window_bytes),
                ("grpc.experimental.tcp_max_read_buffer_size", _READ_BUFFER_BYTES),
                # A client that is gone is noticed in a minute or two.
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
                ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.server_handshake_timeout_ms", round(handshake_timeout_s * 1000)),
                ("grpc.max_connection_idle_ms", _CONNECTION_IDLE_MS),
                # More on one connection would be refused; this many a proxy may need.
                ("grpc.max_concurrent_streams", calls_max),
                # Each may have a connection of its own, as far as there are descriptors.
                ("grpc.max_allowed_incoming_connections", _connections_max(calls_max)),
            ],
        )
        add_OptimizerServiceServicer_to_server(OptimizerServicer(registry), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._add_reflection()

    async def start(
        self, host: str, port: int, credentials: grpc.ServerCredentials | None = None
    ) -> str:
        """Serve, and return the address; see listen().

        Raises:
            AddressInUseError: The address cannot be bound.
        """
        address = listen(self._server, host, port, credentials)
        logging.getLogger("grpc._cython.cygrpc").addFilter(_VANISHED)
        await self._server.start()
        await self._health.set(SERVICE.full_name, health_pb2.HealthCheckResponse.SERVING)
        return address

    async def announce_end(self) -> None:
        """Answer health checks with NOT_SERVING from now on."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Take no more calls; those that go on have ``grace_s`` to end, and are ended then."""
        self._health.end_watches()
        await self._server.stop(grace_s)

    def _add_reflection(self) -> None:
        """Serve reflection as v1alpha, which is all that grpcio has, and as its equal v1."""
        names = [SERVICE.full_name, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name]
        names += [_REFLECTION.format(version) for version in ("v1", "v1alpha")]
        reflection.enable_server_reflection(names, self._server)
        handler = grpc.stream_stream_rpc_method_handler(
            reflection.aio.ReflectionServicer(names).ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    _REFLECTION.format("v1"), {"ServerReflectionInfo": handler}
                ),
            )
        )


def _connections_max(calls_max: int) -> int:
    """Return how many connections to take: three in four of the descriptors, at the most.

    The rest is for files, and for memory that is shared.
    """
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return calls_max
    return min(calls_max, descriptors * 3 // 4)
