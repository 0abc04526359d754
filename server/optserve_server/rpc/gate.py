"""The gate before what is served beside the service: reflection, and the rest of health."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc

from optserve_server.core.errors import UnauthenticatedError
from optserve_server.core.events import Observer
from optserve_server.rpc import status
from optserve_server.rpc.access import Access, Answering

_Handler = Any  # grpc.RpcMethodHandler, whose attributes its types do not name.
_Context = Any  # grpc.aio.ServicerContext[Any, Any]

OPEN = "/grpc.health.v1.Health/Check"
"""The one method for which nobody is asked who they are: probes have nothing to show."""


class Gate(grpc.aio.ServerInterceptor):
    """Lets known callers into the methods of every service but one, which asks by itself."""

    def __init__(self, service: str, access: Access, observer: Observer) -> None:
        """Guard what is not ``service``, a full name."""
        self._prefix = f"/{service}/"
        self._access = access
        self._observer = observer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """Return the guarded handler of the call."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or method == OPEN or method.startswith(self._prefix):
            return handler
        make, behaviour = {
            (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
            (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
            (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
            (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
        }[handler.request_streaming, handler.response_streaming]
        return make(
            self._guarded(behaviour), handler.request_deserializer, handler.response_serializer
        )

    def _guarded(self, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def yielding(request: Any, context: _Context) -> AsyncIterator[Any]:
            try:
                admission = await self._access.admit(context)
                async for response in behaviour(request, context):
                    admission.check()
                    yield response
            except UnauthenticatedError as error:
                await self._refuse(error, context)

        async def answering(request: Any, context: _Context) -> Any:
            try:
                admission = await self._access.admit(context)
                return await behaviour(request, Answering(admission))
            except UnauthenticatedError as error:
                await self._refuse(error, context)

        return yielding if inspect.isasyncgenfunction(behaviour) else answering

    async def _refuse(self, error: UnauthenticatedError, context: _Context) -> NoReturn:
        self._observer.refused(status.reason_of(error))
        await status.abort(context, error)
