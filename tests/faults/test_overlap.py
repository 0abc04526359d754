"""Steps that are answered while their gradients arrive, and what may come between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, zip_longest

import pytest
import torch
from faults.overlapping import (
    SHAPES,
    Local,
    World,
    adam_spec,
    begin_half,
    gradients,
    overlapping,
    slices,
)
from messages import chunks_of
from parity.cases import choose
from refusals import refused
from scenarios.models import EPOCHS_UNIT
from streams import Answer, RawStream, bytes_by_position

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_pb2 import Adam, Optimizer
from optserve.v1.scheduler_pb2 import StepLR
from optserve.v1.tensor_pb2 import TensorChunk, TensorChunks

LAST = 3  # The step that is disturbed.


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with overlapping() as served:
        yield served


def _stand(stream: RawStream, local: Local) -> None:
    """Take the steps before the one that is disturbed."""
    for step in range(1, LAST):
        answer = stream.step(step, gradients(step))
        assert (answer.begins, answer.parameters) == (1, local.step(step))


def _client_gone(stream: RawStream) -> None:
    begin_half(stream, LAST)
    stream.receive_ahead()
    stream.cancel()


def _half_closed(stream: RawStream) -> None:
    begin_half(stream, LAST)
    stream.receive_ahead()
    assert "result" not in [each.WhichOneof("event") for each in stream.half_close()]


def _not_finite_at_the_end(stream: RawStream) -> None:
    spoilt = [gradient.clone() for gradient in gradients(LAST)]
    spoilt[-1][-1] = torch.nan
    messages = list(chunks_of(spoilt))
    stream.begin(LAST)
    stream.chunks(messages[:-1])
    stream.receive_ahead()
    stream.chunks(messages[-1:])
    stream.end()
    _refused(stream.answer(), "NON_FINITE_GRADIENT")


def _ended_too_early(stream: RawStream) -> None:
    begin_half(stream, LAST)
    stream.receive_ahead()
    stream.end()
    _refused(stream.answer(), "BYTE_COUNT_MISMATCH")


def _chunk_out_of_order(stream: RawStream) -> None:
    rest = begin_half(stream, LAST)
    stream.receive_ahead()
    stream.chunks([TensorChunks(chunks=[TensorChunk(tensor=4, offset=0, data=b"abcd")])])
    stream.chunks(rest)  # Sent before the client knew.
    stream.end()
    _refused(stream.answer(), "CHUNK_OUT_OF_ORDER")


def _packed_instead(stream: RawStream) -> None:
    begin_half(stream, LAST)
    stream.receive_ahead()
    stream.send(packed=pb.PackedStep(step=LAST, gradients=[b"abcd"]))
    _refused(stream.answer(), "LIMIT_EXCEEDED")


def _step_of_the_future_instead(stream: RawStream) -> None:
    begin_half(stream, LAST)
    stream.receive_ahead()
    stream.begin(LAST + 5)
    _refused(stream.answer(), "STEP_OUT_OF_ORDER")


def _begun_again(stream: RawStream) -> None:
    begin_half(stream, LAST)
    stream.receive_ahead()


def _begun_again_and_again(stream: RawStream) -> None:
    for _ in range(5):
        begin_half(stream, LAST)


def _last_step_again_instead(stream: RawStream) -> None:
    begin_half(stream, LAST)
    stream.receive_ahead()
    stream.begin(LAST - 1)
    stream.end()
    answer = stream.answer()
    assert answer.result is not None
    assert (answer.begins, answer.result.step, answer.result.replayed) == (2, LAST - 1, True)


def _refused(answer: Answer, reason: str) -> None:
    assert answer.refusal is not None
    assert answer.refusal.reason == reason
    assert answer.begins == 1


ENDS_STREAM = (_client_gone, _half_closed)
GIVES_UP = (
    *(_not_finite_at_the_end, _ended_too_early, _chunk_out_of_order, _packed_instead),
    *(_step_of_the_future_instead, _last_step_again_instead),
    *(_begun_again, _begun_again_and_again),
)


def _id(disturb: Callable[[RawStream], None]) -> str:
    return disturb.__name__.strip("_").replace("_", "-")


@pytest.mark.parametrize("disturb", [*ENDS_STREAM, *GIVES_UP], ids=_id)
def test_a_step_that_is_given_up_or_refused_has_changed_nothing(
    world: World, disturb: Callable[[RawStream], None]
) -> None:
    local = Local()
    with world.session() as session_id:
        with world.stream(session_id) as stream:
            _stand(stream, local)
            disturb(stream)
            before = list(world.driver.download(session_id).values())
            assert bytes_by_position(before) == local.bytes()
            if disturb not in ENDS_STREAM:
                _goes_on(stream, local)
                return
        world.until(lambda: world.driver.get(session_id).status.steps == LAST - 1)
        with world.reopened(session_id) as stream:
            _goes_on(stream, local)


def _goes_on(stream: RawStream, local: Local) -> None:
    """Take the disturbed step, and one more: with the bits of a session that knows no trouble."""
    for step in (LAST, LAST + 1):
        answer = stream.step(step, gradients(step))
        assert answer.refusal is None
        assert answer.parameters == local.step(step)


def _updated(world: World, session_id: str, local: Local) -> None:
    optimizer = choose(Optimizer(), Adam(lr=0.5, weight_decay=0.1))
    world.driver.update(pb.UpdateSessionRequest(session_id=session_id, optimizer=optimizer))
    local.optimizer.param_groups[0].update(lr=0.5, weight_decay=0.1)


def _uploaded(world: World, session_id: str, local: Local) -> None:
    value = torch.linspace(0, 1, 77)
    world.driver.upload(session_id, {"tail": value})
    local.parameters[-1].copy_(value)


def _epoch_ended(world: World, session_id: str, local: Local) -> None:
    world.driver.end_epoch(session_id, 1)
    local.optimizer.param_groups[0]["lr"] *= 0.1


@pytest.mark.parametrize(
    "change", [_updated, _uploaded, _epoch_ended], ids=["update", "upload", "epoch"]
)
def test_a_change_in_the_middle_makes_the_answer_start_afresh(
    world: World, change: Callable[[World, str, Local], None]
) -> None:
    local = Local()
    with (
        world.session(adam_spec(StepLR(step_size=1), EPOCHS_UNIT)) as session_id,
        world.stream(session_id) as stream,
    ):
        _stand(stream, local)
        rest = begin_half(stream, LAST)
        stream.receive_ahead()
        change(world, session_id, local)
        stream.chunks(rest)
        stream.end()
        answer = stream.answer()
        assert (answer.begins, answer.parameters) == (2, local.step(LAST))
        answer = stream.step(LAST + 1, gradients(LAST + 1))
        assert (answer.begins, answer.parameters) == (1, local.step(LAST + 1))


def test_kernels_that_take_the_place_of_fused_ones_get_whole_tensors(world: World) -> None:
    with world.session() as session_id:
        actor = world.loop.run(world.registry.find("", session_id))
        pieces = world.loop.call(actor.session.preview).pieces
        assert all(each is not None for each in pieces)
        plain = choose(Optimizer(), Adam(lr=0.5, fused=False))
        world.driver.update(pb.UpdateSessionRequest(session_id=session_id, optimizer=plain))
        pieces = world.loop.call(actor.session.preview).pieces
        assert [each is None for each in pieces] == [name in ("large", "second") for name in SHAPES]


def _looked_at(world: World, session_id: str) -> None:
    world.driver.download(session_id)
    world.driver.get(session_id)


def _update_refused(world: World, session_id: str) -> None:
    optimizer = choose(Optimizer(), Adam(lr=-1))
    with refused("INVALID_HYPERPARAMETER"):
        world.driver.update(pb.UpdateSessionRequest(session_id=session_id, optimizer=optimizer))


def _epoch_refused(world: World, session_id: str) -> None:
    with refused("EPOCH_OUT_OF_ORDER"):
        world.driver.end_epoch(session_id, 7)


@pytest.mark.parametrize(
    "look", [_looked_at, _update_refused, _epoch_refused], ids=["download", "update", "epoch"]
)
def test_what_changes_nothing_in_the_middle_does_not_disturb_the_answer(
    world: World, look: Callable[[World, str], None]
) -> None:
    local = Local()
    with world.session() as session_id, world.stream(session_id) as stream:
        _stand(stream, local)
        rest = begin_half(stream, LAST)
        stream.receive_ahead()
        look(world, session_id)
        stream.chunks(rest)
        stream.end()
        answer = stream.answer()
        assert (answer.begins, answer.parameters) == (1, local.step(LAST))


def test_a_session_deleted_in_the_middle_ends_the_stream_and_leaves_nothing(world: World) -> None:
    tasks = world.tasks()
    with world.session() as session_id, world.stream(session_id) as stream:
        begin_half(stream, 1)
        stream.receive_ahead()
        world.driver.delete(session_id)
        with refused("SESSION_DELETED"):
            stream.answer()
    world.until(lambda: world.tasks() <= tasks)


def _as_announced(tensors: list[list[TensorChunks]]) -> list[TensorChunks]:
    return list(chain.from_iterable(tensors))


def _reversed(tensors: list[list[TensorChunks]]) -> list[TensorChunks]:
    """As a backward pass gives them."""
    return list(chain.from_iterable(reversed(tensors)))


def _interleaved(tensors: list[list[TensorChunks]]) -> list[TensorChunks]:
    return [each for turn in zip_longest(*tensors) for each in turn if each is not None]


@pytest.mark.parametrize("order", [_as_announced, _reversed, _interleaved], ids=_id)
def test_an_answer_comes_before_the_last_gradients_have_left(
    world: World, order: Callable[[list[list[TensorChunks]]], list[TensorChunks]]
) -> None:
    local = Local()
    with world.session() as session_id, world.stream(session_id) as stream:
        for step in (1, 2):
            messages = order(slices(step))
            held_back = len(messages) // 5
            stream.begin(step)
            stream.chunks(messages[:-held_back])
            stream.receive_ahead(1 << 20)  # Read before the rest is sent.
            stream.chunks(messages[-held_back:])
            stream.end()
            answer = stream.answer()
            assert (answer.begins, answer.parameters) == (1, local.step(step))
            assert answer.result is not None
            assert answer.result.step == step
        stored = list(world.driver.download(session_id).values())
        assert bytes_by_position(stored) == local.bytes()
