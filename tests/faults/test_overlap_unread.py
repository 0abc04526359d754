"""Clients that do not read what they are answered ahead: while they send, for long, for ever."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from faults.overlapping import World, overlapping
from messages import bytes_of, chunks_of
from refusals import refused
from scenarios.models import spec
from streams import Answer, RawStream

from optserve.v1.optimizer_pb2 import SGD
from optserve.v1.session_pb2 import SessionSpec
from optserve_server.core.limits import Limits

STALL_S = 2.0  # More than a busy machine needs for a megabyte.
RATE = 0.5

LARGE = {"large": torch.zeros(8_000_000)}  # 32 MB: more than any buffer on the way holds.


@pytest.fixture(scope="module")
def hasty() -> Iterator[World]:
    """Serve with little patience."""
    with overlapping(Limits(stall_timeout_s=STALL_S)) as served:
        yield served


def _spec() -> SessionSpec:
    return spec(SGD(lr=RATE), parameters=LARGE)


def _gradient() -> torch.Tensor:
    return torch.linspace(-1, 1, LARGE["large"].numel())


def _slowly(stream: RawStream) -> None:
    """Send half of the gradient, and take longer for it than the server waits for a message."""
    messages = list(chunks_of([_gradient()]))
    middle = len(messages) // 2
    stream.chunks(messages[:-middle])
    for message in messages[-middle:-1]:
        time.sleep(1.5 * STALL_S / middle)
        stream.chunks([message])
    stream.chunks(messages[-1:])


def _assert_stepped(answer: Answer, parameters: torch.Tensor) -> None:
    assert answer.refusal is None
    assert answer.parameters[0] == bytes_of(parameters)


def test_a_client_may_read_only_once_it_has_sent_everything(hasty: World) -> None:
    expected = LARGE["large"].clone()
    with hasty.session(_spec(), LARGE) as session_id, hasty.stream(session_id) as stream:
        for step in (1, 2):
            stream.begin(step)
            _slowly(stream)
            stream.end()
            _assert_stepped(stream.answer(), expected.sub_(_gradient(), alpha=RATE))


def test_a_client_may_give_a_step_up_before_it_has_read_any_of_it(hasty: World) -> None:
    with hasty.session(_spec(), LARGE) as session_id, hasty.stream(session_id) as stream:
        for _ in range(2):
            stream.begin(1)
            _slowly(stream)
        stream.begin(1)
        _slowly(stream)
        stream.end()
        _assert_stepped(stream.answer(), LARGE["large"] - RATE * _gradient())


def test_a_client_that_never_reads_is_let_go_and_leaves_nothing(hasty: World) -> None:
    tasks = hasty.tasks()
    with hasty.session(_spec(), LARGE) as session_id, hasty.stream(session_id) as stream:
        stream.begin(1)
        stream.chunks(list(chunks_of([_gradient()])))
        stream.end()
        started = time.monotonic()
        with hasty.reopened(session_id) as other:
            assert other.status.steps == 1
            assert STALL_S / 2 < time.monotonic() - started < 20 * STALL_S
            with refused("STALLED"):
                stream.answer()
    hasty.until(lambda: hasty.tasks() <= tasks)


def test_a_client_that_never_reads_of_a_refusal_is_let_go_too(hasty: World) -> None:
    tasks = hasty.tasks()
    spoilt = _gradient()
    spoilt[-1] = torch.nan
    with hasty.session(_spec(), LARGE) as session_id:
        with hasty.stream(session_id) as stream:
            stream.begin(1)
            stream.chunks(list(chunks_of([spoilt])))
            stream.end()
            with hasty.reopened(session_id) as other:
                assert other.status.steps == 0
                with refused("STALLED"):
                    stream.answer()
        hasty.until(lambda: hasty.tasks() <= tasks)
