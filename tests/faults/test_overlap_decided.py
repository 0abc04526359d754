"""Steps that were answered ahead are told of while they are made; nobody sees them half made."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from drivers_grpc import StubDriver
from drivers_shared import SharedTensors
from event_loop import TIMEOUT_S
from faults.durable import JOURNAL, durable_server, snapshots
from faults.overlapping import (
    RATE,
    SHAPES,
    Local,
    World,
    adam_spec,
    are_gone,
    gradients,
    model,
    overlapping,
)
from messages import chunks_of, header_of
from scenarios.models import spec
from streams import RawStream, bytes_by_position, raw_stream

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.loss_pb2 import MSELoss
from optserve.v1.optimizer_pb2 import Adam
from optserve.v1.session_pb2 import Durability, SessionState
from optserve_server.core.actor import SessionActor
from optserve_server.core.round import Contribution
from optserve_server.core.session import Session
from optserve_server.core.surroundings import Overlap
from optserve_server.rpc.ahead import Ahead

CLIENT = b"c" * 16
MOMENT_S = 0.2  # For what must not come before the update has been made.


class _Update:
    """Holds the updates of sessions, once they have begun, until it is told to let them go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.let_go = threading.Event()

    def reached(self) -> None:
        """Wait, in the thread that is about to compute."""
        self.begun.set()
        assert self.let_go.wait(TIMEOUT_S)


@pytest.fixture
def update(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Update]:
    """Hold all updates."""
    held, apply = _Update(), Session._apply

    def late(self: Session, given: object) -> None:
        held.reached()
        apply(self, given)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "_apply", late)
    yield held
    held.let_go.set()


@contextmanager
def _while_one_is_made(update: _Update) -> Iterator[tuple[World, str, RawStream]]:
    """Serve a session whose first step has been told of, and is being made."""
    with (
        overlapping() as world,
        world.session() as session_id,
        raw_stream(world.driver, session_id, client_id=CLIENT) as stream,
    ):
        answer = stream.step(1, gradients(1))
        assert answer.result is not None
        assert (answer.result.step, answer.begins) == (1, 1)
        assert answer.parameters == Local().step(1)
        assert update.begun.wait(TIMEOUT_S)
        yield world, session_id, stream
        update.let_go.set()


def _got(driver: StubDriver, session_id: str) -> int:
    return driver.get(session_id).status.steps


def _listed(driver: StubDriver, session_id: str) -> int:
    return {each.session_id: each.steps for each in driver.sessions().sessions}[session_id]


def _contributed(driver: StubDriver, session_id: str) -> int:
    contribution = driver.contribution(session_id).contribution
    assert contribution.applied
    return contribution.step


def _taken_over(driver: StubDriver, session_id: str) -> int:
    with raw_stream(driver, session_id, client_id=CLIENT) as stream:
        assert stream.opened.contribution.applied
        return stream.status.steps


def _downloaded(driver: StubDriver, session_id: str) -> int:
    stored = list(driver.download(session_id).values())
    assert bytes_by_position(stored) == Local().step(1)
    return 1


@pytest.mark.parametrize(
    "look", [_got, _listed, _contributed, _taken_over, _downloaded], ids=lambda each: each.__name__
)
def test_whoever_looks_at_the_session_sees_the_step_that_was_told_of(
    update: _Update, look: Callable[[StubDriver, str], int]
) -> None:
    with _while_one_is_made(update) as (world, session_id, _), ThreadPoolExecutor(1) as looking:
        seen = looking.submit(look, world.driver, session_id)
        _not_yet(seen)
        update.let_go.set()
        assert seen.result(TIMEOUT_S) == 1


def _not_yet(future: Future[Any]) -> None:
    with pytest.raises(TimeoutError):
        future.result(MOMENT_S)


def test_the_next_step_may_be_sent_at_once_and_waits_for_the_update(update: _Update) -> None:
    local = Local()
    local.step(1)
    with _while_one_is_made(update) as (_, _, stream):
        stream.begin(2)
        stream.chunks(list(chunks_of(gradients(2))))
        stream.end()
        update.let_go.set()
        assert stream.answer().parameters == local.step(2)


def test_a_client_that_leaves_after_the_result_leaves_the_step(update: _Update) -> None:
    local = Local()
    local.step(1)
    with _while_one_is_made(update) as (world, session_id, stream):
        stream.cancel()
        update.let_go.set()
        with world.reopened(session_id) as other:
            assert other.status.steps == 1
            assert other.step(2, gradients(2)).parameters == local.step(2)


def test_who_leaves_while_the_step_is_made_leaves_no_gradients_behind(update: _Update) -> None:
    with _while_one_is_made(update) as (world, session_id, stream):
        actor = world.registry._actors[session_id]
        gone = are_gone(world.loop.call(actor._rounds._staging[0].all))
        stream.cancel()
        world.until(lambda: not list(actor._seats))
        update.let_go.set()
        world.until(gone)


def test_a_page_that_waits_is_listed_though_its_last_session_is_deleted(update: _Update) -> None:
    with _while_one_is_made(update) as (world, session_id, _), ThreadPoolExecutor(1) as listing:
        last, beyond = (world.driver.create(adam_spec()).status.session_id for _ in range(2))
        listed = listing.submit(world.driver.sessions, 2)
        _not_yet(listed)
        world.driver.delete(last)
        update.let_go.set()
        page = listed.result(TIMEOUT_S)
        assert session_id in {each.session_id for each in page.sessions}
        rest = world.driver.sessions(2, page.next_page_token).sessions
        assert [each.session_id for each in rest] == [beyond]
        world.driver.delete(beyond)


def test_a_loss_whose_data_came_after_the_result_is_one_after_the_step(update: _Update) -> None:
    with (
        overlapping() as world,
        world.session(spec(Adam(lr=RATE), parameters=model(), loss=MSELoss())) as session_id,
        raw_stream(world.driver, session_id) as stream,
        ThreadPoolExecutor(1) as evaluating,
    ):
        values = torch.ones(5)
        requests: SimpleQueue[pb.EvaluateLossStreamRequest | None] = SimpleQueue()
        call = world.driver.stub.EvaluateLossStream(iter(requests.get, None), timeout=TIMEOUT_S)
        header = header_of("values", values)
        begin = pb.LossBegin(session_id=session_id, predictions=header, targets=header)
        requests.put(pb.EvaluateLossStreamRequest(begin=begin))
        actor = world.registry._actors[session_id]
        world.until(lambda: actor._uses > 0)
        assert stream.step(1, gradients(1)).result
        assert update.begun.wait(TIMEOUT_S)
        for chunks in chunks_of([values, values]):
            requests.put(pb.EvaluateLossStreamRequest(chunks=chunks))
        requests.put(None)
        evaluated = evaluating.submit(next, call)
        _not_yet(evaluated)
        update.let_go.set()
        assert evaluated.result(TIMEOUT_S).evaluated.result.steps == 1


def test_a_session_that_is_being_deleted_is_listed_with_what_was_told(update: _Update) -> None:
    wanted = adam_spec()
    wanted.durability.CopyFrom(snapshots(1000))
    with durable_server(overlap=Overlap.ON) as server, ThreadPoolExecutor(2) as calling:
        session_id = server.driver.create(wanted).status.session_id
        server.driver.upload(session_id, model())
        with raw_stream(server.driver, session_id) as stream:
            assert stream.step(1, gradients(1)).result
            deleted = calling.submit(server.driver.delete, session_id)
            _not_yet(deleted)
            listed = calling.submit(server.driver.sessions)
            _not_yet(listed)
            update.let_go.set()
            assert all(each.steps == 1 for each in listed.result(TIMEOUT_S).sessions)
            assert deleted.result(TIMEOUT_S).steps == 1


def test_who_sees_the_parameters_without_asking_is_told_once_they_are_there() -> None:
    with overlapping() as world, world.session() as session_id:
        headers = world.driver.get(session_id).spec.parameters
        with raw_stream(world.driver, session_id, shared_memory=True) as stream:
            offer = stream.opened.shared_memory
            region = SharedTensors(offer.process, offer.parameters, headers)
            answer = stream.step(1, gradients(1))  # In chunks, for all that.
            seen = [bytes(region.memory[region.places[name]]) for name in SHAPES]
        assert answer.parameters == Local().step(1)
        assert [each for each in seen if each] == list(answer.parameters.values())


def test_a_session_that_breaks_while_the_step_is_made_has_failed_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("torch has none")

    monkeypatch.setattr(Session, "_apply", broken)
    with overlapping() as world, world.session() as session_id:
        with world.stream(session_id) as stream:
            assert stream.step(1, gradients(1)).result
            refusal = stream.step(2, gradients(2)).refusal
            assert refusal is not None
            assert refusal.reason == "SESSION_FAILED"
        assert world.driver.get(session_id).status.state == SessionState.SESSION_STATE_FAILED
    assert "torch has none" in caplog.text


def test_a_change_that_comes_before_the_update_makes_the_answer_start_afresh(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    local, value = Local(), torch.linspace(0, 1, 77)
    local.parameters[-1].copy_(value)
    completed, changes = Ahead.completed, []

    async def change(actor: SessionActor) -> None:
        async with actor.writing() as session:
            session.set_parameters({len(local.parameters) - 1: value})

    def with_a_change(self: Ahead, contribution: Contribution) -> Contribution:
        changes.append(asyncio.create_task(change(self._actor)))  # It is in front of the step.
        return completed(self, contribution)

    monkeypatch.setattr(Ahead, "completed", with_a_change)
    with overlapping() as world, world.session() as session_id, world.stream(session_id) as stream:
        answer = stream.step(1, gradients(1))
        assert (answer.begins, answer.parameters) == (2, local.step(1))


@pytest.mark.parametrize(
    ("durability", "waits"),
    [(snapshots(1000), False), (JOURNAL, True)],
    ids=["snapshot", "journal"],
)
def test_what_a_journal_is_to_keep_is_told_once_it_does(
    update: _Update, durability: Durability, waits: bool
) -> None:
    wanted = adam_spec()
    wanted.durability.CopyFrom(durability)
    with durable_server(overlap=Overlap.ON) as server, ThreadPoolExecutor(1) as stepping:
        session_id = server.driver.create(wanted).status.session_id
        server.driver.upload(session_id, model())
        with raw_stream(server.driver, session_id) as stream:
            answer = stepping.submit(stream.step, 1, gradients(1))
            assert update.begun.wait(TIMEOUT_S)
            if waits:
                with pytest.raises(TimeoutError):
                    answer.result(MOMENT_S)
                update.let_go.set()
            assert answer.result(TIMEOUT_S).parameters == Local().step(1)
            update.let_go.set()


def test_a_step_that_is_refused_is_refused_before_anybody_was_told(update: _Update) -> None:
    spoilt = [each.clone() for each in gradients(1)]
    spoilt[0][0] = float("nan")
    with overlapping() as world, world.session() as session_id, world.stream(session_id) as stream:
        refusal = stream.step(1, spoilt).refusal
        assert refusal is not None
        assert refusal.reason == "NON_FINITE_GRADIENT"
        assert not update.begun.is_set()
        assert world.driver.get(session_id).status.steps == 0
