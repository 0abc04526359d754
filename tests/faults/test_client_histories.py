"""The checker of histories takes what can be, and refuses every history with something wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from faults.machines.history import (
    Course,
    Entry,
    RateChange,
    Saw,
    Tensors,
    Training,
    hash_of,
    judge,
    trajectory,
)
from torch import Tensor

STEPS = 5


def _content(digest: bytes) -> Tensors:
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return {"w": torch.randn(3, generator=generator)}


def _adam(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.1)


TRAINING = Training(initial={"w": torch.ones(3)}, optimizer=_adam, workers=2, content=_content)


def _digest(worker: int, step: int) -> bytes:
    return bytes([worker, step])


CONTRIBUTIONS = [[_digest(0, step), _digest(1, step)] for step in range(1, STEPS + 1)]
STATES = trajectory(TRAINING, Course(contributions=CONTRIBUTIONS))
FINAL = STATES[-1]


def _right() -> list[Entry]:
    log = []
    for step in range(1, STEPS + 1):
        for worker in (0, 1):
            sent = Entry(worker=worker, saw=Saw.SENT, step=step, digest=_digest(worker, step))
            log += [sent, replace(sent, saw=Saw.ANSWERED, parameters=hash_of(STATES[step]))]
    return log


def _without(log: Sequence[Entry], worker: int, step: int, saw: Saw) -> list[Entry]:
    return [each for each in log if (each.worker, each.step, each.saw) != (worker, step, saw)]


def test_what_every_client_saw_of_a_session_that_keeps_its_promises_is_a_history() -> None:
    verdict = judge(_right(), TRAINING, STEPS, FINAL)
    assert verdict.ok, verdict.failures
    assert verdict.acknowledged == STEPS


def test_answers_that_were_repeated_are_a_history() -> None:
    log = [again for entry in _right() for again in (entry, entry)]
    assert judge(log, TRAINING, STEPS, FINAL).ok


def test_last_step_without_an_answer_may_have_been_made_or_not() -> None:
    log = _right()
    for worker in (0, 1):
        log = _without(log, worker, STEPS, Saw.ANSWERED)
    assert judge(log, TRAINING, STEPS, FINAL).ok
    assert judge(log, TRAINING, STEPS - 1, STATES[-2]).ok


def test_step_that_one_worker_was_answered_for_was_made() -> None:
    log = _without(_right(), 0, STEPS, Saw.ANSWERED)
    assert judge(log, TRAINING, STEPS, FINAL).ok
    assert judge(log, TRAINING, STEPS - 1, STATES[-2]).lost == 1


def test_contribution_that_nobody_was_answered_for_is_one_of_those_sent() -> None:
    log = _without(_right(), 1, STEPS, Saw.ANSWERED)
    other = Entry(worker=1, saw=Saw.SENT, step=STEPS, digest=b"other")
    assert judge([*log, other], TRAINING, STEPS, FINAL).ok


def test_step_of_which_a_worker_was_told_needs_no_answer() -> None:
    log = _without(_right(), 0, 3, Saw.ANSWERED)
    at = log.index(Entry(worker=0, saw=Saw.SENT, step=4, digest=_digest(0, 4)))
    log.insert(at, Entry(worker=0, saw=Saw.TOLD, step=3))
    assert judge(log, TRAINING, STEPS, FINAL).ok


def test_steps_that_may_be_lost_are_taken_back_and_made_again() -> None:
    training = replace(TRAINING, rollback_max=2)
    log = _right() + [Entry(worker=worker, saw=Saw.TOLD, step=3) for worker in (0, 1)]
    verdict = judge(log, training, 3, STATES[3])
    assert verdict.ok, verdict.failures
    assert verdict.taken_back == 2 * 2
    assert judge(log, replace(TRAINING, rollback_max=1), 3, STATES[3]).lost
    assert judge(log, TRAINING, 3, STATES[3]).lost


RATES = [0.1, 0.1, 0.05, 0.05, 0.2]
CHANGES = [
    RateChange(rate=0.1, earliest=0, latest=0),
    RateChange(rate=0.05, earliest=2, latest=2),
    RateChange(rate=0.2, earliest=3, latest=5),
]
CHANGED = trajectory(TRAINING, Course(contributions=CONTRIBUTIONS, rates=RATES))


def _changed_log() -> list[Entry]:
    """Return what was seen of a session whose rate changed, but for the last step's."""
    return [
        replace(entry, parameters=hash_of(CHANGED[entry.step]), rate=RATES[entry.step - 1])
        if entry.saw is Saw.ANSWERED
        else entry
        for entry in _without(_without(_right(), 0, STEPS, Saw.ANSWERED), 1, STEPS, Saw.ANSWERED)
    ]


def test_a_change_comes_where_the_steps_say_that_it_came() -> None:
    verdict = judge(_changed_log(), TRAINING, STEPS, CHANGED[-1], CHANGES)
    assert verdict.ok, verdict.failures
    assert verdict.course is not None
    assert verdict.course.rates == RATES  # Though nobody was told of the last one.


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        pytest.param(CHANGES, FINAL, id="change-without-effect"),
        pytest.param(CHANGES[:1], CHANGED[-1], id="rate-that-nobody-set"),
        pytest.param(
            [CHANGES[0], replace(CHANGES[1], earliest=1, latest=1), CHANGES[2]],
            CHANGED[-1],
            id="step-that-did-not-use-the-new-rate",
        ),
        pytest.param(
            [*CHANGES, RateChange(rate=0.1, earliest=4, latest=4)],
            CHANGED[-1],
            id="change-taken-back",
        ),
    ],
)
def test_a_change_that_came_elsewhere_or_not_at_all_is_found(
    changes: Sequence[RateChange], parameters: Tensors
) -> None:
    assert not judge(_changed_log(), TRAINING, STEPS, parameters, changes).ok


def _applied(*steps: int) -> Tensors:
    """Return the parameters if just these steps had been applied."""
    applied = Course(contributions=[CONTRIBUTIONS[step - 1] for step in steps])
    return trajectory(TRAINING, applied)[-1]


def _off_by_one_bit() -> Tensors:
    bits = FINAL["w"].clone().view(torch.int32)
    bits[1] ^= 1
    return {"w": bits.view(torch.float32)}


@pytest.mark.parametrize(
    ("steps", "parameters", "lost", "doubled"),
    [
        pytest.param(4, STATES[4], 1, 0, id="last-step-lost"),
        pytest.param(3, STATES[3], 2, 0, id="two-steps-lost"),
        pytest.param(5, _applied(1, 2, 4, 5), 1, 0, id="step-counted-and-not-applied"),
        pytest.param(5, _applied(1, 2, 2, 3, 4, 5), 0, 1, id="step-applied-twice"),
        pytest.param(5, _applied(1, 2, 3, 4, 5, 5), 0, 1, id="last-step-applied-twice"),
        pytest.param(5, _applied(1, 3, 2, 4, 5), 0, 0, id="steps-in-another-order"),
        pytest.param(6, FINAL, 0, 0, id="step-that-nobody-sent"),
        pytest.param(5, _off_by_one_bit(), 0, 0, id="bit"),
        pytest.param(5, {"w": torch.ones(3)}, 0, 0, id="nothing-applied"),
    ],
)
def test_session_that_comes_to_something_else_is_refused(
    steps: int, parameters: Tensors, lost: int, doubled: int
) -> None:
    verdict = judge(_right(), TRAINING, steps, parameters)
    assert not verdict.ok
    assert (verdict.lost, verdict.doubled) == (lost, doubled)
    assert verdict.failures


Wrong = Callable[[list[Entry]], list[Entry]]


def _answer(worker: int, step: int) -> Entry:
    return Entry(worker=worker, saw=Saw.ANSWERED, step=step, digest=_digest(worker, step))


SENT_OTHER = Entry(worker=0, saw=Saw.SENT, step=3, digest=b"other")


def _changed(log: list[Entry], worker: int, step: int, answer: Entry) -> list[Entry]:
    return [
        replace(each, digest=answer.digest, parameters=answer.parameters)
        if (each.worker, each.step, each.saw) == (worker, step, Saw.ANSWERED)
        else each
        for each in log
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda log: [*log, _answer(0, 3)], id="answer-of-an-earlier-step"),
        pytest.param(lambda log: _without(log, 1, 2, Saw.SENT), id="answer-to-what-was-not-sent"),
        pytest.param(lambda log: _without(log, 0, 2, Saw.ANSWERED), id="step-left-out"),
        pytest.param(
            lambda log: [
                *log[: 4 * 2 + 2],
                SENT_OTHER,
                replace(_answer(0, 3), digest=b"other"),
                *log[4 * 2 + 2 :],
            ],
            id="two-contributions-answered",
        ),
        pytest.param(
            lambda log: _changed(log, 1, 4, replace(_answer(1, 4), parameters=hash_of(STATES[3]))),
            id="stale",
        ),
        pytest.param(lambda log: _changed(log, 1, 4, _answer(1, 3)), id="digest-of-another"),
        pytest.param(
            lambda log: [*log, Entry(worker=0, saw=Saw.TOLD, step=STEPS + 2)], id="told-too-much"
        ),
        pytest.param(
            lambda log: [*log, Entry(worker=1, saw=Saw.TOLD, step=4)], id="told-too-little"
        ),
        pytest.param(
            lambda log: [
                replace(each, digest=b"other") if (each.worker, each.step) == (0, 2) else each
                for each in log
            ],
            id="content-of-another",
        ),
    ],
)
def test_clients_that_saw_something_else_are_believed(wrong: Wrong) -> None:
    log = wrong(_right())
    assert log != _right()
    assert not judge(log, TRAINING, STEPS, FINAL).ok
