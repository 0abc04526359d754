"""What clients saw of a session, and whether a session that keeps its promises can show them that.

A session is one writer with numbered steps, so its history is a line: no search is needed. Whoever
was answered had its contribution in that very step, once; what nobody was answered for may be in
the step after the last, or not at all. Torch, here, makes the same steps from the same
contributions, and must come to the same bits.
"""

from __future__ import annotations

import enum
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from messages import bytes_of
from torch import Tensor

Tensors = Mapping[str, Tensor]

_CHOICES_MAX = 1 << 13  # Of what may have been contributed where nobody was answered.


class Saw(enum.StrEnum):
    """What a client saw."""

    SENT = "sent"
    """It sent a contribution, or the beginning of one."""
    ANSWERED = "answered"
    """It was answered: the step is applied."""
    TOLD = "told"
    """It was told that the session stands at this step, and went on from there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing that a client saw, in its order."""

    worker: int
    saw: Saw
    step: int
    digest: bytes = b""
    """Of what was contributed."""
    parameters: bytes = b""
    """Hash of the parameters that came with the answer; empty if none did."""
    rate: float | None = None
    """Learning rate that the step has used; None if nobody looked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RateChange:
    """Another learning rate, and how many steps had been made when it came into force."""

    rate: float
    earliest: int
    latest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a session trains, so that torch can do it again."""

    initial: Tensors
    optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer]
    workers: int
    content: Callable[[bytes], Tensors]
    """Gradients by the digest that they were sent with."""
    rollback_max: int = 0
    """How many acknowledged steps the session may lose at a time, if it says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What a session has made of its steps."""

    contributions: Sequence[Sequence[bytes]]
    """For each step, the digests of what the workers contributed, in their order."""
    rates: Sequence[float] | None = None
    """For each step, its learning rate. None: what the optimizer began with."""


@dataclass(slots=True)
class Verdict:
    """What a history proves."""

    acknowledged: int = 0
    """How many steps were acknowledged to at least one worker, and not taken back."""
    lost: int = 0
    doubled: int = 0
    taken_back: int = 0
    """How many acknowledged steps were lost as agreed."""
    failures: list[str] = field(default_factory=list)
    course: Course | None = None
    """What must have been. None: nothing is."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with it."""
        return not (self.lost or self.doubled or self.failures)


def hash_of(tensors: Tensors) -> bytes:
    """Return a hash of the tensors' bytes, in the order of their names."""
    return hashlib.blake2b(
        b"".join(bytes_of(tensors[name]) for name in sorted(tensors)), digest_size=16
    ).digest()


def judge(
    log: Sequence[Entry],
    training: Training,
    steps: int,
    parameters: Tensors,
    changes: Sequence[RateChange] = (),
) -> Verdict:
    """Look whether what the clients saw, and what the session came to, is one history.

    Args:
        log: Of all workers; each worker's entries in its own order.
        training: What the session trains.
        steps: How many steps the session has made in the end.
        parameters: The session's, in the end.
        changes: All rates that were in force, in their order; the first one from the beginning.
            None: there is only that of the optimizer.
    """
    verdict = Verdict()
    answers: dict[tuple[int, int], Entry] = {}
    for worker in range(training.workers):
        own = [entry for entry in log if entry.worker == worker]
        answers |= _answers_of(own, training.rollback_max, verdict)
    acknowledged = {step for _, step in answers}
    verdict.acknowledged = len(acknowledged)
    beyond = sorted(step for step in acknowledged if step > steps)
    if beyond:
        verdict.lost += len(beyond)
        verdict.failures.append(f"acknowledged, and not there in the end: steps {beyond}")
    options = _contributions(log, answers, training.workers, steps, verdict)
    used = {step: answer.rate for (_, step), answer in answers.items() if answer.rate is not None}
    rates = list(_rates(changes, used, steps)) if changes else [None]
    if not rates:
        verdict.failures.append(f"the steps have used the rates {used}, and never had {changes}")
    if verdict.ok:
        courses = (
            Course(contributions=chosen, rates=each)
            for each in rates
            for chosen in _choices(options)
        )
        _replay(courses, answers, training, parameters, verdict)
    return verdict


def trajectory(training: Training, course: Course) -> list[Tensors]:
    """Make steps with torch; return the parameters before the first, and after each of them."""
    parameters = {name: value.clone() for name, value in training.initial.items()}
    optimizer = training.optimizer(list(parameters.values()))
    states: list[Tensors] = [{name: value.clone() for name, value in parameters.items()}]
    for position, digests in enumerate(course.contributions):
        if course.rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = course.rates[position]
        brought = [training.content(digest) for digest in digests]
        for name, parameter in parameters.items():
            total = brought[0][name].clone()
            for each in brought[1:]:
                total.add_(each[name])
            parameter.grad = total.div_(len(brought)) if len(brought) > 1 else total
        optimizer.step()
        states.append({name: value.detach().clone() for name, value in parameters.items()})
    return states


def _answers_of(
    own: Sequence[Entry], rollback_max: int, verdict: Verdict
) -> dict[tuple[int, int], Entry]:
    """Return what one worker was answered, and did not lose as agreed, by worker and step."""
    answers: dict[tuple[int, int], Entry] = {}
    sent: set[tuple[int, bytes]] = set()
    last = 0
    for entry in own:
        key, at = (entry.worker, entry.step), f"worker {entry.worker}, step {entry.step}"
        match entry.saw:
            case Saw.SENT:
                sent.add((entry.step, entry.digest))
            case Saw.ANSWERED:
                if (entry.step, entry.digest) not in sent:
                    verdict.failures.append(f"{at}: answered for what it had not sent")
                if key in answers and answers[key].digest != entry.digest:
                    verdict.doubled += 1
                    verdict.failures.append(f"{at}: answered for two different contributions")
                if entry.step not in (last, last + 1):
                    verdict.failures.append(f"{at}: answered after step {last}")
                answers[key] = entry
                last = entry.step
            case Saw.TOLD:
                back = last - entry.step
                if back < -1 or back > rollback_max:
                    verdict.lost += max(0, back)
                    verdict.failures.append(f"{at}: told to go on from there, after step {last}")
                for step in range(entry.step + 1, last + 1):
                    answers.pop((entry.worker, step), None)
                verdict.taken_back += max(0, back)
                last = entry.step
    return answers


def _contributions(
    log: Sequence[Entry],
    answers: Mapping[tuple[int, int], Entry],
    workers: int,
    steps: int,
    verdict: Verdict,
) -> list[list[Sequence[bytes]]]:
    """Return for each step, for each worker, the digests of what it may have contributed."""
    attempts: dict[tuple[int, int], dict[bytes, None]] = {}
    for entry in log:
        if entry.saw is Saw.SENT:
            attempts.setdefault((entry.worker, entry.step), {})[entry.digest] = None
    options: list[list[Sequence[bytes]]] = []
    for step, worker in itertools.product(range(1, steps + 1), range(workers)):
        if worker == 0:
            options.append([])
        if (worker, step) in answers:
            options[-1].append([answers[worker, step].digest])
        elif (worker, step) in attempts:
            options[-1].append(list(attempts[worker, step]))
        else:
            verdict.failures.append(f"step {step} was made, and worker {worker} never sent it")
    return options


def _rates(
    changes: Sequence[RateChange], used: Mapping[int, float], steps: int
) -> Iterator[Sequence[float]]:
    """Yield for each step its rate, in every way in which the changes may have come.

    Args:
        changes: In their order.
        used: What steps are known to have used.
        steps: How many steps there are.
    """
    spans = [range(change.earliest, change.latest + 1) for change in changes]
    for places in itertools.product(*spans):
        if list(places) != sorted(places):
            continue
        in_force = [sum(place < step for place in places) for step in range(1, steps + 1)]
        rates = [changes[count - 1].rate for count in in_force]
        if all(rates[step - 1] == rate for step, rate in used.items()):
            yield rates


def _replay(
    courses: Iterable[Course],
    answers: Mapping[tuple[int, int], Entry],
    training: Training,
    parameters: Tensors,
    verdict: Verdict,
) -> None:
    """Make the steps with torch, and compare with what was seen."""
    wanted, first = hash_of(parameters), None
    for course in courses:
        first = first or course
        hashes = [hash_of(state) for state in trajectory(training, course)]
        if hashes[-1] == wanted:
            break
    else:
        assert first is not None
        _name(first, wanted, training, verdict)
        return
    verdict.course = course
    for (worker, step), answer in answers.items():
        if answer.parameters and hashes[step] != answer.parameters:
            verdict.failures.append(f"worker {worker} saw other parameters after step {step}")


def _choices(options: Sequence[Sequence[Sequence[bytes]]]) -> Iterator[list[list[bytes]]]:
    """Yield every way to choose one of what each worker may have contributed to each step."""
    flat = [each for step in options for each in step]
    for chosen in itertools.islice(itertools.product(*flat), _CHOICES_MAX):
        left = iter(chosen)
        yield [[next(left) for _ in step] for step in options]


def _name(course: Course, wanted: bytes, training: Training, verdict: Verdict) -> None:
    """Say what must have happened for the session to come to other parameters than torch."""
    for at in range(len(course.contributions)):
        without = [step for step in range(len(course.contributions)) if step != at]
        twice = sorted([*range(len(course.contributions)), at])
        if hash_of(trajectory(training, _of(course, without))[-1]) == wanted:
            verdict.lost += 1
            verdict.failures.append(f"step {at + 1} has no effect on the parameters")
            return
        if hash_of(trajectory(training, _of(course, twice))[-1]) == wanted:
            verdict.doubled += 1
            verdict.failures.append(f"step {at + 1} was applied twice")
            return
    verdict.failures.append("the parameters are not what torch makes of the same steps")


def _of(course: Course, steps: Sequence[int]) -> Course:
    """Return a course of some of the steps of another one."""
    return Course(
        contributions=[course.contributions[step] for step in steps],
        rates=None if course.rates is None else [course.rates[step] for step in steps],
    )
