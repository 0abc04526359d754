"""Bytes that are no message, no known field, no bounded size; told to a real process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import torch
from drivers_grpc import StubDriver
from event_loop import TIMEOUT_S
from faults.ground import OF_CHECKPOINTS
from faults.http2 import MIB, call, framed, gzip_bomb
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from messages import message_of
from refusals import RefusedError, refused, translated
from scenarios.models import create, gradients, spec
from server_process import ServerProcess

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_pb2 import SGD
from optserve.v1.tensor_pb2 import TensorChunk, TensorChunks

SERVICE = pb.DESCRIPTOR.services_by_name["OptimizerService"]
METHODS = {method.name: method for method in SERVICE.methods}
OF_A_SESSION = {
    name: method
    for name, method in METHODS.items()
    if "session_id" in method.input_type.fields_by_name and name not in OF_CHECKPOINTS
}
OF_CHUNKS = {
    name: method for name, method in METHODS.items() if "chunks" in method.input_type.fields_by_name
}

GARBAGE = {
    "not-a-field": b"\xff\xff\xff\xff",
    "cut-off": b"\x0a\x20abc",
    "a-text-that-is-no-utf-8": b"\x0a\x02\xff\xfe",
    "a-group-without-end": b"\x0b\x0b\x0b",
    "a-length-that-overflows": b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
}
UNKNOWN_FIELD = b"\xc0\x3e\x01"  # Field 1000.


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        yield opened


def _call(channel: grpc.Channel, method: MethodDescriptor, *messages: bytes) -> list[bytes]:
    """Call a method with messages that are sent as they are; return what comes, undecoded."""
    path = f"/{SERVICE.full_name}/{method.name}"
    kinds: dict[tuple[bool, bool], Callable[[str], Any]] = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    undecoded = kinds[method.client_streaming, method.server_streaming](path)
    request = iter(messages) if method.client_streaming else messages[0]
    with translated():
        answer = undecoded(request, timeout=TIMEOUT_S)
        return list(answer) if method.server_streaming else [answer]


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_bytes_that_are_no_message_are_refused(
    channel: grpc.Channel, method: MethodDescriptor, garbage: bytes
) -> None:
    first = method.input_type.fields_by_number.get(1)
    holds_bytes = first is not None and first.type in (first.TYPE_STRING, first.TYPE_MESSAGE)
    if garbage == GARBAGE["a-text-that-is-no-utf-8"] and not holds_bytes:
        with refused("UNKNOWN_FIELD"):  # As a field of another type it is none that is known.
            _call(channel, method, garbage)
        return
    with refused("MALFORMED_MESSAGE", field="") as caught:
        _call(channel, method, garbage)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert method.name in caught.value.message


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_fields_that_are_not_known_are_refused(
    channel: grpc.Channel, method: MethodDescriptor
) -> None:
    with refused("UNKNOWN_FIELD") as caught:
        _call(channel, method, UNKNOWN_FIELD)
    assert caught.value.actual == "field 1000"


@pytest.mark.parametrize("place", ["chunks.chunks[1]", "chunks", ""])
@pytest.mark.parametrize("method", OF_CHUNKS.values(), ids=OF_CHUNKS)
def test_fields_that_are_not_known_are_refused_among_chunks_too(
    channel: grpc.Channel, method: MethodDescriptor, place: str
) -> None:
    """Of a newer client they may say what the bytes mean."""
    unknown = {place: UNKNOWN_FIELD}
    chunk = TensorChunk(data=b"a").SerializeToString()
    newer = TensorChunk.FromString(chunk + unknown.get("chunks.chunks[1]", b""))
    chunks = TensorChunks(chunks=[TensorChunk(data=b"a"), newer])
    event = GetMessageClass(method.input_type)()
    newer_chunks = TensorChunks.FromString(chunks.SerializeToString() + unknown.get("chunks", b""))
    event.chunks.CopyFrom(newer_chunks)  # type: ignore[attr-defined] # see OF_CHUNKS
    with refused("UNKNOWN_FIELD", field=place) as caught:
        _call(channel, method, event.SerializeToString() + unknown.get("", b""))
    assert caught.value.actual == "field 1000"


@pytest.mark.parametrize("method", OF_A_SESSION.values(), ids=OF_A_SESSION)
@pytest.mark.parametrize("session_id", ["", "0" * 32, "\N{SNOWMAN}" * 100_000])
def test_a_session_that_is_not_there_is_refused_by_every_call(
    channel: grpc.Channel, method: MethodDescriptor, session_id: str
) -> None:
    request = pb.GetSessionRequest(session_id=session_id)  # They all begin with it.
    with refused("SESSION_NOT_FOUND", field="session_id") as caught:
        _call(channel, method, request.SerializeToString())
    assert caught.value.code is grpc.StatusCode.NOT_FOUND


def test_a_stream_of_a_session_that_is_not_there_is_refused(channel: grpc.Channel) -> None:
    beginnings = {
        "Train": (pb.TrainRequest(open=pb.TrainOpen()), "open.session_id"),
        "UploadParameters": (
            pb.UploadParametersRequest(begin=pb.UploadBegin()),
            "begin.session_id",
        ),
        "EvaluateLossStream": (
            pb.EvaluateLossStreamRequest(begin=pb.LossBegin()),
            "begin.session_id",
        ),
    }
    for name, (beginning, _field) in beginnings.items():
        with refused("SESSION_NOT_FOUND"):
            _call(channel, METHODS[name], beginning.SerializeToString())


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_in_the_middle_of_a_stream_ends_the_stream_and_changes_nothing(
    server: ServerProcess, channel: grpc.Channel, garbage: bytes
) -> None:
    with StubDriver(server.address) as driver:
        session_id = create(driver, spec(SGD()))
        opening = pb.TrainRequest(open=pb.TrainOpen(session_id=session_id))
        begin = pb.TrainRequest(begin=pb.StepBegin(step=1))
        before = driver.get(session_id)
        for events in ([opening], [opening, begin]):
            sent = [event.SerializeToString() for event in events]
            with refused("MALFORMED_MESSAGE"):
                _call(channel, METHODS["Train"], *sent, garbage)
        assert driver.get(session_id) == before
        with driver.worker(session_id) as worker:
            assert worker.start(1, gradients(1)).result(TIMEOUT_S).result.step == 1
        driver.delete(session_id)


def test_a_page_that_was_never_given_is_refused(server: ServerProcess) -> None:
    with StubDriver(server.address) as driver:
        session_id = create(driver, spec(SGD()))
        for token in ("x", "-1", "1.5", "٣", "9" * 30, "\x00", "1 "):
            with refused("INVALID_FIELD", field="page_token"):
                driver.sessions(0, token)
            with refused("INVALID_FIELD", field="page_token"):
                driver.loss_points(
                    pb.ListLossPointsRequest(session_id=session_id, page_token=token)
                )
        with refused("INVALID_FIELD", field="split"):
            driver.loss_points(pb.ListLossPointsRequest(session_id=session_id, split=9))  # type: ignore[arg-type]
        driver.delete(session_id)


def test_a_message_larger_than_allowed_is_refused_unread(server: ServerProcess) -> None:
    with StubDriver(server.address) as driver:
        session_id = create(driver, spec(SGD()))
        large = message_of(torch.zeros(2 * MIB), "w")
        request = pb.StepRequest(session_id=session_id, step=1, gradients=[large])
        with pytest.raises(RefusedError) as caught, translated():
            driver.stub.Step(request, timeout=TIMEOUT_S)
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert driver.get(session_id).status.steps == 0
        driver.delete(session_id)


PATH = f"/{SERVICE.full_name}/EvaluateLoss"
SLACK_BYTES = 64 * MIB  # What a server that did nothing may grow by.


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity", "snappy", None])
def test_a_compressed_bomb_is_refused_before_it_is_inflated(
    server: ServerProcess, encoding: str | None
) -> None:
    before = server.peak_bytes()
    headers = [] if encoding is None else [("grpc-encoding", encoding)]
    answer = call(server.address, PATH, framed(gzip_bomb(1500), compressed=True), *headers)
    codes = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL)
    assert answer["grpc-status"] in {str(code.value[0]) for code in codes}
    assert server.peak_bytes() < before + SLACK_BYTES


def test_a_message_that_only_says_that_it_is_large_takes_nothing(server: ServerProcess) -> None:
    before = server.peak_bytes()
    answer = call(server.address, PATH, framed(b"", length=2**32 - 1))
    assert answer["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    assert server.peak_bytes() < before + SLACK_BYTES


def test_a_shape_of_terabytes_takes_nothing(server: ServerProcess) -> None:
    before = server.peak_bytes()
    with StubDriver(server.address) as driver:
        wanted = spec(SGD())
        wanted.parameters[0].shape[:] = [2_500_000, 1_000_000]
        for _ in range(20):
            with refused("LIMIT_EXCEEDED", field="spec.parameters"):
                driver.create(wanted)
    assert server.peak_bytes() < before + SLACK_BYTES


def test_a_refusal_with_long_facts_still_arrives(server: ServerProcess) -> None:
    """A status travels in trailers, of which a client takes 8 KiB by default."""
    names = [chr(0x1F600 + i) * 64 for i in range(5)]  # 256 bytes each
    values = {name: torch.zeros(1) for name in names}
    with StubDriver(server.address) as driver:
        session_id = driver.create(spec(SGD(), parameters=values)).status.session_id
        with refused("PARAMETERS_NOT_SET", field="parameters") as caught:
            driver.download(session_id)
        assert names[0] in caught.value.message
        driver.upload(session_id, values)
        with refused("UNKNOWN_NAME", field="names[0]"):
            driver.download(session_id, ["\N{GRINNING FACE}" * 500_000])
        driver.delete(session_id)
