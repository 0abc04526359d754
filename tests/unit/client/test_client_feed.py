"""Gradients that are passed on one by one, and the step that waits for them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.error_pb2 import Reason, Refusal
from optserve.v1.tensor_pb2 import DataType, TensorHeader
from optserve.wire import Buffer, Source
from optserve_client._exchange import Step
from optserve_client._feed import Feed, FeedClosedError
from optserve_client._incoming import Room

NAMES = ["first", "second"]
HEADERS = [TensorHeader(name=name, data_type=DataType.DATA_TYPE_UINT8, shape=[4]) for name in NAMES]


def at_once() -> None:
    pass


def source_of(_name: str, gradient: memoryview) -> Source:
    return Buffer(gradient)


def step_of(feed: Feed) -> Step:
    begin = pb.StepBegin(step=1, every_parameter=True)
    return Step(begin, feed.chunks(source_of, 3), HEADERS, Room(HEADERS))


def test_chunks_come_in_the_order_of_the_gradients_and_the_last_ones_need_no_end() -> None:
    feed = Feed(NAMES)
    chunks = feed.chunks(source_of, 3)
    feed.put(1, memoryview(b"abcd"), at_once)
    assert [tuple(chunk) for chunk in next(chunks)] == [(1, 0, b"abc")]
    feed.put(0, memoryview(b"efgh"), at_once)
    assert [tuple(chunk) for chunk in next(chunks)] == [(1, 3, b"d"), (0, 0, b"ef")]
    assert [tuple(chunk) for chunk in next(chunks)] == [(0, 2, b"gh")]
    feed.end()
    assert next(chunks, None) is None


def test_a_gradient_is_waited_for_before_it_is_read() -> None:
    feed, data = Feed(["only"]), bytearray(4)

    def copied() -> None:
        data[:] = b"done"

    feed.put(0, memoryview(data), copied)
    assert [(at, bytes(gradient)) for at, gradient in feed.gradients()] == [(0, b"done")]


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "incomplete"])
def test_who_waits_is_released_when_the_feed_is_closed(complete: bool) -> None:
    feed = Feed(NAMES)
    feed.put(0, memoryview(b"abcd"), at_once)
    if complete:
        feed.put(1, memoryview(b"abcd"), at_once)
    events = step_of(feed).requests()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(list, events)
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        feed.close()
        with pytest.raises(FeedClosedError):
            waiting.result(10)


def test_what_comes_after_the_close_is_not_kept_and_not_sent() -> None:
    feed = Feed(NAMES)
    feed.put(0, memoryview(b"abcd"), at_once)
    feed.close()
    feed.put(1, memoryview(b"abcd"), at_once)
    feed.end()
    with pytest.raises(FeedClosedError):
        next(feed.gradients())


def test_a_refused_step_says_no_more_and_leaves_the_stream_open() -> None:
    feed = Feed(NAMES)
    step = step_of(feed)
    events = step.requests()
    assert next(events)
    refusal = Refusal(reason=Reason.REASON_STEP_OUT_OF_ORDER)
    assert step.receive(pb.TrainResponse(refused=pb.StepRefused(step=1, refusal=refusal)))
    feed.close()
    assert list(events) == []


def test_what_is_ended_may_be_sent_again_all_at_once() -> None:
    feed, data = Feed(NAMES), bytearray(4)

    def copied() -> None:
        data[:] = b"done"

    feed.put(1, memoryview(b"abcd"), at_once)
    feed.put(0, memoryview(data), copied)
    assert not feed.is_ended
    assert feed.end()
    assert feed.settle()
    assert [bytes(each) for each in feed.all()] == [b"done", b"abcd"]
    feed.close()
    assert not feed.settle()


def test_what_is_not_ended_when_it_fails_is_given_up() -> None:
    feed = Feed(NAMES)
    feed.put(0, memoryview(b"abcd"), at_once)
    assert not feed.settle()
    assert not feed.end()
    assert not feed.settle()
