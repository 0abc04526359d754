"""When steps are answered ahead, what that takes, and that it is given back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from faults.overlapping import (
    Local,
    World,
    adam_spec,
    are_gone,
    begin_half,
    disturb_often,
    gradients,
    model,
    overlapping,
)
from scenarios.models import spec
from streams import bytes_by_position

from optserve.v1.optimizer_pb2 import SGD
from optserve.v1.session_pb2 import SessionSpec
from optserve_server.core.admission import Budget
from optserve_server.core.limits import Limits
from optserve_server.core.preview import PIECE_ELEMENTS, Piece, Preview
from optserve_server.core.surroundings import Overlap
from optserve_server.rpc.ahead import MEMORY_BYTES

MIB = 1 << 20


def _reserved_by_a_step(world: World, spec_: SessionSpec, values: dict[str, torch.Tensor]) -> int:
    """Return how much memory a stream reserves for a step; none while it rests."""
    budget, counts = world.registry.budget, [0]
    reserve = Budget.reserve

    def watched(self: Budget, count: int, *, what: str, field: str) -> None:
        reserve(self, count, what=what, field=field)
        counts.append(count)

    with world.session(spec_, values) as session_id, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Budget, "reserve", watched)
        before = budget.reserved_bytes
        with world.stream(session_id) as stream:
            for step in (1, 2):
                assert budget.reserved_bytes == before
                stream.step(step, list(values.values()))
                world.until(lambda: budget.reserved_bytes == before)
    return max(counts)


def _large(count: int) -> dict[str, torch.Tensor]:
    return {"large": torch.zeros(count)}


def test_a_step_takes_room_only_where_it_is_worth_it_and_a_stream_that_rests_takes_none() -> None:
    two_mib = 2 * MIB // 4
    with overlapping() as on:
        sgd = SGD(lr=1)
        for values, reserved in ((_large(two_mib), 0), (_large(two_mib + 1), MEMORY_BYTES)):
            assert _reserved_by_a_step(on, spec(sgd, parameters=values), values) == reserved
    for overlap in (Overlap.OFF, Overlap.AUTO):  # Auto: the client is on this host.
        with overlapping(overlap=overlap) as off:
            assert _reserved_by_a_step(off, adam_spec(), model()) == 0


def test_without_room_steps_are_answered_after_their_last_gradient() -> None:
    with overlapping() as roomy, roomy.session():
        session_bytes = roomy.registry.budget.reserved_bytes
    for room, ahead in ((MEMORY_BYTES, True), (MEMORY_BYTES - 1, False)):
        limits = Limits(memory_bytes_max=session_bytes + room)
        local = Local()
        with overlapping(limits) as world, world.session() as session_id:
            for _ in range(2):  # What a step has reserved, the next one may have.
                with world.reopened(session_id) as stream:
                    step = stream.status.steps + 1
                    rest = begin_half(stream, step)
                    if ahead:
                        stream.receive_ahead()
                    during = world.registry.budget.reserved_bytes - session_bytes
                    assert during == (MEMORY_BYTES if ahead else 0)
                    stream.chunks(rest)
                    stream.end()
                    answer = stream.answer()
                    assert (answer.begins, answer.parameters) == (1, local.step(step))
                    world.until(lambda: world.registry.budget.reserved_bytes == session_bytes)


def test_memory_that_a_session_lets_go_is_not_kept_by_what_was_looked_ahead_of() -> None:
    with overlapping() as world, world.session() as session_id:
        actor = world.loop.run(world.registry.find("", session_id))
        with world.stream(session_id) as stream:
            for step in (1, 2):
                stream.step(step, gradients(step))
            world.loop.run(actor.made())
            staged = world.loop.call(lambda: actor.begin(0, 3, None).targets)  # As at each step.
            gone = are_gone(staged)
            del staged
        world.until(gone)
        gone = are_gone(actor.session.parameters)
        world.loop.call(actor.session.share)  # Which moves them.
        assert gone()


def test_two_hundred_disturbed_steps_leave_no_task_and_no_memory_reserved() -> None:
    with overlapping() as world:
        tasks = world.tasks()
        with world.session() as session_id:  # Which makes sure that no memory stays reserved.
            disturb_often(world.driver, session_id, 200)
        world.until(lambda: world.tasks() <= tasks)


def test_no_more_is_computed_at_once_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches = []
    compute = Preview.compute

    def watched(self: Preview, pieces: Sequence[tuple[Piece, torch.Tensor]]) -> list[torch.Tensor]:
        batches.append(4 * sum(piece.last - piece.first for piece, _ in pieces))
        return compute(self, pieces)

    monkeypatch.setattr(Preview, "compute", watched)
    # Four of them are a little less than a batch, and five are a quarter more.
    values = {str(number): torch.zeros(PIECE_ELEMENTS - 1) for number in range(11)}
    gradients = [torch.ones_like(value) for value in values.values()]
    with (
        overlapping() as world,
        world.session(spec(SGD(lr=1), parameters=values), values) as session_id,
        world.stream(session_id) as stream,
    ):
        answer = stream.step(1, gradients)
        assert answer.parameters == bytes_by_position([-each for each in gradients])
    assert sum(batches) == 4 * 11 * (PIECE_ELEMENTS - 1), "each of them once"
    # With gradients, state and temporaries, 7 of each; beside them, 16 MiB may wait.
    assert max(batches) * 7 <= MEMORY_BYTES - 16 * MIB
