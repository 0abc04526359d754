"""However a call ends, nothing is left of it: no memory, file, thread, task, lock or message."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from drivers import take
from drivers_core import registry_on
from drivers_grpc import StubDriver
from event_loop import TIMEOUT_S, EventLoopThread
from faults.disks import MemoryDisk
from faults.durable import HERE
from faults.machines.valid import CHECKPOINT, SERVICE, requests
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from scenarios.models import B_GROUP, gradients, model, spec

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.loss_pb2 import CrossEntropyLoss
from optserve.v1.optimizer_pb2 import Adam
from optserve_server.core.limits import Limits
from optserve_server.core.persistence import Persistence
from optserve_server.core.registry import SessionRegistry
from optserve_server.rpc.server import Server
from optserve_server.storage.local import LocalStorage

METHODS = sorted(SERVICE.methods_by_name)
DELETIONS = ("DeleteCheckpoint", "DeleteSession")
CREATIONS = ("CreateSession", "RestoreCheckpoint")
SHORT_S = 0.1  # For the server to be in the middle of a call.
TIMES = 3  # What is left behind once may be kept for the next time; what grows is lost.


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """What a server may lose."""

    reserved_bytes: int
    tasks: int
    files: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """A server in this process, and how to call it without a client's own objects in the way."""

    loop: EventLoopThread
    registry: SessionRegistry
    driver: StubDriver
    channel: grpc.Channel

    def holdings(self) -> Holdings:
        threads = [each.name for each in threading.enumerate()]
        return Holdings(
            reserved_bytes=self.registry.budget.reserved_bytes,
            tasks=self.loop.call(lambda: len(asyncio.all_tasks())),
            files=_files(),
            threads=sum(not name.startswith("ThreadPoolExecutor") for name in threads),
        )

    def settle(self, before: Holdings) -> None:
        """Wait until no more is held than before: the server sees the end of a call later."""
        deadline = time.monotonic() + TIMEOUT_S / 6
        while not _within(self.holdings(), before):
            assert time.monotonic() < deadline, f"{self.holdings()}, and before {before}"
            time.sleep(0.02)

    def call(self, method: str, messages: Iterator[bytes], timeout_s: float = TIMEOUT_S) -> Any:  # noqa: ANN401 # A call and an iterator, for which grpc's types have no name.
        """Begin a call; on the wire, one message is a stream of one."""
        begin: Any = self.channel.stream_stream(
            f"/{SERVICE.full_name}/{method}",
            request_serializer=None,
            response_deserializer=None,
        )
        return begin(messages, timeout=timeout_s)

    def create(self) -> str:
        """Create a session that has stepped, and been saved."""
        wanted = spec(Adam(lr=0.1), groups=[B_GROUP], loss=CrossEntropyLoss())
        session_id: str = self.driver.create(wanted, model()).status.session_id
        with self.driver.worker(session_id) as worker:
            take(worker, 1, gradients(1))
        self.driver.stub.SaveCheckpoint(
            pb.SaveCheckpointRequest(session_id=session_id, name=CHECKPOINT), timeout=TIMEOUT_S
        )
        return session_id


def _files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _within(now: Holdings, before: Holdings) -> bool:
    return (
        now.reserved_bytes == before.reserved_bytes
        and now.tasks <= before.tasks
        and now.files <= before.files
        and now.threads <= before.threads
    )


@pytest.fixture(scope="module")
def where() -> Iterator[Where]:
    with ExitStack() as stack:
        yield _served(stack)


def _served(stack: ExitStack) -> Where:
    loop = stack.enter_context(EventLoopThread())
    executor = stack.enter_context(ThreadPoolExecutor(2))
    storage = LocalStorage(MemoryDisk(), HERE)
    stack.callback(storage.close)
    persistence = Persistence(storage=storage, executor=executor, origin=HERE)
    registry = stack.enter_context(registry_on(loop, Limits(), persistence=persistence))
    server = loop.call(lambda: Server(registry))
    address = loop.run(server.start("127.0.0.1", 0))
    stack.callback(lambda: loop.run(server.stop(0)))
    driver = stack.enter_context(StubDriver(address))
    channel = stack.enter_context(grpc.insecure_channel(address))
    # It has its connection before anybody counts files.
    grpc.channel_ready_future(channel).result(timeout=TIMEOUT_S)
    return Where(loop=loop, registry=registry, driver=driver, channel=channel)


def _messages(method: str, session_id: str) -> list[bytes]:
    """Return the messages of a call that goes well."""
    descriptor = SERVICE.methods_by_name[method]
    messages: Sequence[Message] = requests(session_id)[method]
    if not descriptor.client_streaming:
        messages = messages[:1]
    elif method == "Train":  # Up to the end of its first step.
        ends = [isinstance(each, pb.TrainRequest) and each.HasField("end") for each in messages]
        messages = messages[: ends.index(True) + 1]
    return [each.SerializeToString() for each in messages]


def _held_open(messages: Sequence[bytes], released: threading.Event) -> Iterator[bytes]:
    """Send messages, and then nothing, not even an end."""
    yield from messages
    released.wait(TIMEOUT_S)


def _end_well(where: Where, method: str, messages: list[bytes]) -> None:
    answers = list(where.call(method, iter(messages)))
    if method == "CreateSession":
        created = pb.CreateSessionResponse.FromString(answers[0])
        where.driver.delete(created.session.status.session_id)
    elif method == "RestoreCheckpoint":
        restored = pb.RestoreCheckpointResponse.FromString(answers[0])
        where.driver.delete(restored.session.status.session_id)


def _end_by_cancel(where: Where, method: str, messages: list[bytes]) -> None:
    released = threading.Event()
    call = where.call(method, _held_open(messages, released))
    time.sleep(SHORT_S)
    call.cancel()
    released.set()


def _end_by_deadline(where: Where, method: str, messages: list[bytes]) -> None:
    released = threading.Event()
    with pytest.raises(grpc.RpcError) as caught:
        list(where.call(method, _held_open(messages, released), timeout_s=SHORT_S))
    released.set()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def _end_by_error(where: Where, method: str, messages: list[bytes]) -> None:
    """Break the last message, after the server has taken the others."""
    with pytest.raises(grpc.RpcError) as caught:
        list(where.call(method, iter([*messages[:-1], messages[-1] + b"\xff"])))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


ENDS: dict[str, Callable[[Where, str, list[bytes]], None]] = {
    "ok": _end_well,
    "cancel": _end_by_cancel,
    "deadline": _end_by_deadline,
    "error": _end_by_error,
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_call_leaves_nothing_behind(
    where: Where, method: str, end: Callable[[Where, str, list[bytes]], None]
) -> None:
    where.create()  # So that there is one of everything before.
    session_id = where.create()
    empty = where.holdings()
    gone = method in DELETIONS and end is not _end_by_error
    for _ in range(1 if gone else TIMES):
        end(where, method, _messages(method, session_id))
    reserved = {each.session_id: each.reserved_bytes for each in where.driver.sessions().sessions}
    if session_id in reserved:
        # Nobody holds it: it can be changed. Then it is empty again, but for its steps.
        request = pb.UpdateSessionRequest(session_id=session_id, display_name="still here")
        where.driver.update(request)
        where.driver.delete(session_id)
    for other in list(reserved):
        if other != session_id:
            where.driver.delete(other)
    where.settle(
        Holdings(reserved_bytes=0, tasks=empty.tasks, files=empty.files, threads=empty.threads)
    )


@pytest.fixture(scope="module")
def _little_to_look_through() -> Iterator[None]:
    """Hide what stands already from the collector: to look through torch takes half a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_little_to_look_through")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("end", [_end_well, _end_by_error], ids=["ok", "error"])
def test_a_request_is_let_go_with_its_call(
    where: Where, method: str, end: Callable[[Where, str, list[bytes]], None]
) -> None:
    """At once, and not when Python looks for cycles: requests hold tensors."""
    session_id = where.create()
    messages = _messages(method, session_id)
    kind = GetMessageClass(SERVICE.methods_by_name[method].input_type)
    gc.collect()
    others = _requests(kind)  # Of tests that have theirs ready.
    gc.disable()
    try:
        for _ in range(1 if method in DELETIONS else TIMES):
            end(where, method, messages)
        deadline = time.monotonic() + TIMEOUT_S / 6
        while count := len(_requests(kind)) - len(others):
            assert time.monotonic() < deadline, f"{count} requests are kept"
            time.sleep(0.02)
    finally:
        gc.enable()
    for status in where.driver.sessions().sessions:
        where.driver.delete(status.session_id)


def _requests(kind: type[Message]) -> list[object]:
    return [each for each in gc.get_objects() if type(each) is kind]


def test_a_server_that_stops_in_the_middle_of_every_call_leaves_nothing_behind() -> None:
    with ExitStack() as outer:
        loop = outer.enter_context(EventLoopThread())
        tasks = loop.call(lambda: len(asyncio.all_tasks()))
        files = _files()
        released = threading.Event()
        with ExitStack() as stack:
            where = _served(stack)
            calls = []
            reserved_bytes = 0
            # The others make and unmake what is counted, even in their last moment.
            for method in sorted({*METHODS} - {*DELETIONS, *CREATIONS}):
                session_id = where.create()
                reserved_bytes += where.driver.get(session_id).status.reserved_bytes
                messages = _messages(method, session_id)
                calls.append(where.call(method, _held_open(messages, released)))
            time.sleep(5 * SHORT_S)
            budget = where.registry.budget
        released.set()
        for call in calls:
            assert call.code() is not None  # It was told.
        deadline = time.monotonic() + TIMEOUT_S / 6
        while loop.call(lambda: len(asyncio.all_tasks())) > tasks:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert _files() <= files
        assert budget.reserved_bytes == reserved_bytes  # The sessions', and nothing beside.
