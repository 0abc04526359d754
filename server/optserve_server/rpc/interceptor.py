"""The boundary of the service.

What comes in is counted and decoded safely, what goes wrong is told properly.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any, Final

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from optserve.codec import codec_of, unwrapped
from optserve_server.core.errors import MalformedMessageError, OptserveError
from optserve_server.core.events import Observer, RpcKind, RpcMethod
from optserve_server.core.limits import Limits
from optserve_server.core.traffic import Traffic
from optserve_server.rpc import status, transfer
from optserve_server.rpc.access import Access, Admission, Answering
from optserve_server.rpc.constraints import check_known

_LOGGER = logging.getLogger(__name__)
# What a message decodes to when it is none; gRPC itself would answer INTERNAL.
_MALFORMED: Final = object()

_Handler = Any  # grpc.RpcMethodHandler, whose attributes its types do not name.
_Context = Any  # grpc.aio.ServicerContext[Any, Any]


def methods_of(service: ServiceDescriptor) -> Iterator[RpcMethod]:
    """Yield the methods of a service as telemetry names them."""
    for method in service.methods:
        yield RpcMethod(kind=_kind(method), service=service.full_name, method=method.name)


class Boundary(grpc.aio.ServerInterceptor):
    """Wraps every method of one service; others pass untouched (see gate.py).

    Every request is taken as a stream, even if it is one message: so a call is let in before its
    message is read, and the message has to come in time.
    """

    def __init__(
        self,
        service: ServiceDescriptor,
        access: Access,
        observer: Observer,
        traffic: Traffic,
        limits: Limits,
    ) -> None:
        """Watch a service.

        Args:
            service: Whose methods to wrap.
            access: Asks who calls.
            observer: Told of each call.
            traffic: Lets calls in.
            limits: For how long a message may take to come.
        """
        self._methods = {f"/{each.service}/{each.method}": each for each in methods_of(service)}
        self._codecs = {each.name: codec_of(each.input_type) for each in service.methods}
        self._answer_codecs = {each.name: codec_of(each.output_type) for each in service.methods}
        self._access = access
        self._observer = observer
        self._traffic = traffic
        self._limits = limits

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """Return the wrapped handler of the call."""
        handler = await continuation(handler_call_details)
        method = self._methods.get(str(handler_call_details.method))
        if handler is None or method is None:
            return handler
        behaviour = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )
        make, wrap = {
            RpcKind.UNARY: (grpc.stream_unary_rpc_method_handler, self._with_message),
            RpcKind.SERVER_STREAM: (grpc.stream_stream_rpc_method_handler, self._with_message),
            RpcKind.CLIENT_STREAM: (grpc.stream_unary_rpc_method_handler, self._with_messages),
            RpcKind.BIDI_STREAM: (grpc.stream_stream_rpc_method_handler, self._with_messages),
        }[method.kind]
        codec, answer_codec = self._codecs[method.method], self._answer_codecs[method.method]
        decode = codec.parse if codec else handler.request_deserializer
        encode = answer_codec.encode if answer_codec else handler.response_serializer
        return make(
            wrap(method, behaviour),
            request_deserializer=functools.partial(self._decode, method, decode),
            response_serializer=functools.partial(self._encode, method, encode),
        )

    def _decode(self, method: RpcMethod, decode: Callable[[bytes], Any], data: bytes) -> Any:
        self._observer.message_received(method)
        try:
            return decode(data)
        except Exception:  # noqa: BLE001 - Whatever a decoder raises at a stranger's bytes.
            return _MALFORMED

    def _encode(self, method: RpcMethod, encode: Callable[[Any], bytes], message: Any) -> bytes:
        self._observer.message_sent(method)
        return encode(message)

    def _with_message(self, method: RpcMethod, behaviour: Callable[..., Awaitable[Any]]) -> Any:
        async def handle(requests: AsyncIterator[Any], context: _Context) -> Any:
            async with self._handling(method, context):
                admission = await self._access.admit(context)
                with self._place(method, admission.caller.tenant):
                    request = _checked(method, await transfer.next_or_none(requests, self._limits))
                    # To its end, or gRPC keeps the message until Python looks for cycles.
                    if await transfer.next_or_none(requests, self._limits) is not None:
                        raise MalformedMessageError(f"{method.method} takes one message")
                    return await behaviour(request, Answering(admission))

        return handle

    def _with_messages(self, method: RpcMethod, behaviour: Callable[..., Awaitable[Any]]) -> Any:
        async def handle(requests: AsyncIterator[Any], context: _Context) -> Any:
            async with self._handling(method, context):
                admission = await self._access.admit(context)
                with self._place(method, admission.caller.tenant):
                    checked = _each_checked(method, requests, admission)
                    return await behaviour(checked, context)

        return handle

    @asynccontextmanager
    async def _handling(self, method: RpcMethod, context: _Context) -> AsyncIterator[None]:
        """Count a call, and translate what it raises: nothing comes out but a cancellation."""
        self._observer.rpc_started(method)
        started, code = time.perf_counter(), "OK"
        try:
            yield
        except OptserveError as error:
            code = _go_name(status.STATUS[type(error)][0])
            self._observer.refused(status.reason_of(error))
            status.end(context, error)
        except asyncio.CancelledError:
            code = _go_name(grpc.StatusCode.CANCELLED)
            raise
        except grpc.aio.InternalError:  # What grpc raises at a write to a peer that has gone.
            code = _go_name(grpc.StatusCode.CANCELLED)
        except Exception:
            code = _go_name(grpc.StatusCode.INTERNAL)
            request_id = secrets.token_hex(8)
            _LOGGER.exception(
                "internal error", extra={"request_id": request_id, "method": method.method}
            )
            self._observer.refused("INTERNAL")
            status.end_internal(context, request_id)
        finally:
            self._observer.rpc_handled(method, code, time.perf_counter() - started)

    def _place(self, method: RpcMethod, tenant: str) -> AbstractContextManager[None]:
        """Let a tenant's call in, if there is room; return what holds its place."""
        self._traffic.begin(tenant)
        return self._traffic.call() if method.kind is RpcKind.UNARY else self._traffic.stream()


async def _each_checked(
    method: RpcMethod, requests: AsyncIterator[Any], admission: Admission
) -> AsyncIterator[Any]:
    async for request in requests:
        admission.check()
        yield _checked(method, request)


def _checked(method: RpcMethod, request: Any) -> Any:
    if request is None:
        raise MalformedMessageError(f"{method.method} takes one message, and none came")
    if request is _MALFORMED:
        raise MalformedMessageError(f"the bytes are no message of {method.method}")
    if isinstance(request, list):  # Chunks of which every byte is known.
        return request
    check_known(request)
    return unwrapped(request) if "chunks" in request.DESCRIPTOR.fields_by_name else request


def _kind(method: MethodDescriptor) -> RpcKind:
    if method.client_streaming:
        return RpcKind.BIDI_STREAM if method.server_streaming else RpcKind.CLIENT_STREAM
    return RpcKind.SERVER_STREAM if method.server_streaming else RpcKind.UNARY


def _go_name(code: grpc.StatusCode) -> str:
    """Return a code as Go writes it, for dashboards that know go-grpc-prometheus."""
    if code in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):
        return "OK" if code is grpc.StatusCode.OK else "Canceled"
    return code.name.title().replace("_", "")
