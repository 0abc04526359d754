"""When steps are answered ahead, what it takes, and that it is given back."""

from __future__ import annotations

import threading

import torch
from faults.overlapping import (
    Local,
    World,
    adam_spec,
    begin_half,
    gradients,
    model,
    overlapping,
)
from scenarios.models import spec
from streams import RawStream

from optserve.v1.optimizer_pb2 import SGD
from optserve.v1.session_pb2 import SessionSpec
from optserve_server.core.limits import Limits
from optserve_server.core.surroundings import Overlap
from optserve_server.rpc.ahead import MEMORY_BYTES

MIB = 1 << 20


def _reserved_by_a_stream(world: World, spec_: SessionSpec, values: dict[str, torch.Tensor]) -> int:
    """Return how much memory an open stream reserves."""
    with world.session(spec_, values) as session_id:
        before = world.registry.budget.reserved_bytes
        with world.stream(session_id) as stream:
            stream.begin(7)  # Refused, by a stream that has reserved what it needs.
            assert stream.answer().refusal is not None
            return world.registry.budget.reserved_bytes - before


def _large(count: int) -> dict[str, torch.Tensor]:
    return {"large": torch.zeros(count)}


def test_a_stream_takes_room_only_where_steps_are_worth_it() -> None:
    two_mib = 2 * MIB // 4
    with overlapping() as on:
        sgd = SGD(lr=1)
        for values, reserved in ((_large(two_mib), 0), (_large(two_mib + 1), MEMORY_BYTES)):
            assert _reserved_by_a_stream(on, spec(sgd, parameters=values), values) == reserved
        several = spec(sgd, parameters=model(), workers=2)
        assert _reserved_by_a_stream(on, several, model()) == 0
    for overlap in (Overlap.OFF, Overlap.AUTO):  # Auto: the client is on this host.
        with overlapping(overlap=overlap) as off:
            assert _reserved_by_a_stream(off, adam_spec(), model()) == 0


def test_without_room_steps_are_answered_after_their_last_gradient() -> None:
    with overlapping() as roomy, roomy.session():
        session_bytes = roomy.registry.budget.reserved_bytes
    for room, ahead in ((MEMORY_BYTES, True), (MEMORY_BYTES - 1, False)):
        limits = Limits(memory_bytes_max=session_bytes + room)
        local = Local()
        with overlapping(limits) as world, world.session() as session_id:
            for _ in range(2):  # What a stream has reserved, the next one may have.
                with world.reopened(session_id) as stream:
                    step = stream.status.steps + 1
                    rest = begin_half(stream, step)
                    if ahead:
                        stream.receive_ahead()
                    stream.chunks(rest)
                    stream.end()
                    answer = stream.answer()
                    assert (answer.begins, answer.parameters) == (1, local.step(step))
                    reserved = world.registry.budget.reserved_bytes - session_bytes
                    assert reserved == (MEMORY_BYTES if ahead else 0)


DISTURBANCES = 200


def _disturb(stream: RawStream, number: int) -> bool:
    """Leave a step in the middle, in one of five ways; return whether the stream is still there."""
    begin_half(stream, 1)
    match number % 5:
        case 0:
            stream.receive_ahead()  # The next begin gives it up.
        case 1:
            pass  # And this one before anything was read.
        case 2:
            stream.end()
            assert _reason(stream) == "BYTE_COUNT_MISMATCH"
        case 3:
            stream.begin(7)
            assert _reason(stream) == "STEP_OUT_OF_ORDER"
        case 4:
            stream.receive_ahead()
            stream.cancel()
            return False
    return True


def _reason(stream: RawStream) -> str:
    refusal = stream.answer().refusal
    return refusal.reason if refusal else ""


def _disturb_often(world: World, times: int) -> None:
    """Disturb the first step of a session so often; then take it."""
    numbers = iter(range(times))
    with world.session() as session_id:
        while True:
            with world.reopened(session_id) as stream:
                if all(_disturb(stream, number) for number in numbers):
                    assert stream.step(1, gradients(1)).parameters == Local().step(1)
                    return


def test_two_hundred_disturbed_steps_leave_no_task_and_no_thread_and_no_memory_reserved() -> None:
    with overlapping() as world:
        _disturb_often(world, 10)  # What comes once, and for good.
        tasks, threads = world.tasks(), threading.active_count()
        _disturb_often(world, DISTURBANCES)
        world.until(lambda: world.tasks() <= tasks)
        world.until(lambda: threading.active_count() <= threads)
