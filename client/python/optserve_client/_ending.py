"""How a call of grpc.aio has really ended."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc

_Value = TypeVar("_Value")

# The truth arrives with the next events of the connection: it was 8 ms when a server was killed.
_PATIENCE_S = 0.25
_LOOK_EVERY_S = 0.005


class Ending:
    """What a call ended with, whatever grpc.aio says of it.

    A write that is under way when a call ends fails, and of that grpc.aio makes INTERNAL: over the
    status that the server has sent, or before it has come (grpc/grpc#36066).
    """

    def __init__(self, call: grpc.aio.Call) -> None:
        """Watch a call that has just been made."""
        self._call = call
        self._first: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._note)

    async def reason(self, raised: grpc.RpcError) -> grpc.RpcError:
        """Return why the call failed, now that grpc.aio has raised something."""
        reason = self._first
        if reason is None:
            return raised
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + _PATIENCE_S
        while _is_unexplained(reason) and loop.time() < deadline_s:
            await asyncio.sleep(_LOOK_EVERY_S)
            reason = _status_of(self._call)
        return reason

    def _note(self, _call: object) -> None:
        self._first = self._first or _status_of(self._call)


def _is_unexplained(error: grpc.aio.AioRpcError) -> bool:
    return error.code() is grpc.StatusCode.INTERNAL and not error.trailing_metadata()


def _status_of(call: grpc.aio.Call) -> grpc.aio.AioRpcError:
    """Return what an ended call says now."""
    return grpc.aio.AioRpcError(
        _at_once(call.code()),
        _at_once(call.initial_metadata()),
        _at_once(call.trailing_metadata()),
        details=_at_once(call.details()),
    )


def _at_once(coroutine: Coroutine[Any, Any, _Value]) -> _Value:
    """Return what a coroutine returns that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        value: _Value = stop.value
        return value
    coroutine.close()
    raise AssertionError("an ended call knows how it has ended")
