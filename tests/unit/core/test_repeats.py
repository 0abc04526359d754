"""Steps, digests and workers in any order: the core does what a model of thirty lines does."""

from __future__ import annotations

import math
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from drivers import StepAnswer, Tensors, Worker, wait_for_contribution
from drivers_core import CoreDriver
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from refusals import refused
from scenarios.models import spec

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_pb2 import SGD

DIGESTS = st.sampled_from([b"", b"a", b"b"])
OUT_OF_TURN = st.sampled_from([-2, 1])  # From the number of the next step.
CONTENTS = st.sampled_from([1.0, 2.0, 4.0, 8.0, None, math.nan])  # None: no gradient at all.
WORKERS = st.integers(0, 1)
OTHERS_ID = bytes(16)
ANSWER_S = 5.0  # Far more than any takes, and short enough to shrink what fails.


@dataclass(kw_only=True)
class Model:
    """What must become of a session whose only parameter begins at zero, with SGD of rate 1."""

    workers: int
    value: float = 0.0
    steps: int = 0
    digests: list[bytes] = field(default_factory=list)
    """Of the last step, by worker."""
    round: dict[int, tuple[float | None, bytes]] = field(default_factory=dict)
    """What the next step has so far, by worker."""

    def take(self, worker: int, step: int, content: float | None, digest: bytes) -> str:
        """Take a step; return the reason of a refusal, or what else becomes of it."""
        if step not in (self.steps, self.steps + 1) or step == 0:
            return "STEP_OUT_OF_ORDER"
        if step == self.steps or worker in self.round:
            first = self.digests[worker] if step == self.steps else self.round[worker][1]
            if first and digest and first != digest:
                return "STEP_CONFLICT"
            return "replayed" if step == self.steps else "waits again"
        if content is not None and math.isnan(content):
            return "NON_FINITE_GRADIENT"
        self.round[worker] = content, digest
        return "waits" if len(self.round) < self.workers else self._step()

    def contribution(self, worker: int) -> pb.Contribution | None:
        """Return the worker's last contribution."""
        if worker in self.round:
            return pb.Contribution(step=self.steps + 1, digest=self.round[worker][1])
        if self.steps == 0:
            return None
        return pb.Contribution(step=self.steps, digest=self.digests[worker], applied=True)

    def _step(self) -> str:
        contents = [content for content, _ in self.round.values()]
        digests = [self.round[worker][1] for worker in range(self.workers)]
        self.round = {}
        if all(content is None for content in contents):
            return "NO_GRADIENT"
        self.value -= sum(content or 0.0 for content in contents) / self.workers
        self.steps, self.digests = self.steps + 1, digests
        return "applied"


class Repeats(RuleBasedStateMachine):
    """A session of one or two workers, whose clients do what they like."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.driver = self.stack.enter_context(CoreDriver())
        self.streams: dict[int, tuple[Worker, ExitStack]] = {}
        self.waiting: dict[int, Future[StepAnswer]] = {}

    @initialize(workers=st.sampled_from([2, 2, 1]))
    def create(self, workers: int) -> None:
        values = {"x": torch.zeros(3, dtype=torch.float64)}
        wanted = spec(SGD(lr=1), parameters=values, workers=workers)
        self.session_id = self.driver.create(wanted, values).status.session_id
        self.model = Model(workers=workers)
        for worker in range(workers):
            self._open(worker)

    @rule(worker=WORKERS, content=CONTENTS, digest=DIGESTS)
    def go_on(self, worker: int, content: float | None, digest: bytes) -> None:
        self._send(worker % self.model.workers, self.model.steps + 1, content, digest)

    @rule(worker=WORKERS, digest=DIGESTS, leaves=st.booleans())
    def come_back(self, worker: int, digest: bytes, *, leaves: bool) -> None:
        worker %= self.model.workers
        (self.break_off if leaves else self.take_over)(worker)
        if last := self.model.contribution(worker):
            self._send(worker, last.step, 1.0, digest)

    @rule(worker=WORKERS, digest=DIGESTS)
    @precondition(lambda self: self.model.steps)
    def repeat(self, worker: int, digest: bytes) -> None:
        self._send(worker % self.model.workers, self.model.steps, 1.0, digest)

    @rule(worker=WORKERS, number=OUT_OF_TURN)
    def lose_count(self, worker: int, number: int) -> None:
        step = max(0, self.model.steps + 1 + number)
        self._send(worker % self.model.workers, step, 1.0, b"a")

    def _send(self, worker: int, step: int, content: float | None, digest: bytes) -> None:
        if worker in self.waiting:
            return  # A client sends one step after the other.
        answer = self.streams[worker][0].start(step, _gradients(content), digest)
        match self.model.take(worker, step, content, digest):
            case "waits":
                wanted = self.model.contribution(worker)
                assert wanted is not None
                wait_for_contribution(self.driver, self.session_id, wanted, worker)
                self.waiting[worker] = answer
            case "waits again":
                self.waiting[worker] = answer
                assert not answer.done()
            case "replayed":
                assert self._value_of(answer) == self.model.value
                assert answer.result().result.replayed
            case "applied":
                self._settle(answer)
            case "NO_GRADIENT":
                for each in (answer, *self.waiting.values()):
                    with refused("NO_GRADIENT"):
                        each.result(ANSWER_S)
                self.waiting.clear()
            case reason:
                with refused(reason):
                    answer.result(ANSWER_S)

    @rule(worker=WORKERS)
    def take_over(self, worker: int) -> None:
        worker %= self.model.workers
        _, old = self.streams[worker]
        self._open(worker)
        if lost := self.waiting.pop(worker, None):
            with refused("SEAT_TAKEN_OVER"):
                lost.result(ANSWER_S)
        old.close()

    @rule(worker=WORKERS)
    def break_off(self, worker: int) -> None:
        worker %= self.model.workers
        self._close(worker)
        self._open(worker)

    @rule(worker=WORKERS)
    def be_somebody_else(self, worker: int) -> None:
        worker %= self.model.workers
        with (
            refused("WORKER_BUSY"),
            self.driver.worker(self.session_id, worker, client_id=OTHERS_ID),
        ):
            pass

    @invariant()
    @precondition(lambda self: hasattr(self, "model"))
    def stands_where_the_model_stands(self) -> None:
        for worker in range(self.model.workers):
            answer = self.driver.contribution(self.session_id, worker)
            contribution = answer.contribution if answer.HasField("contribution") else None
            assert contribution == self.model.contribution(worker)
            assert answer.HasField("result") == bool(contribution and contribution.applied)
            assert answer.status.steps == self.model.steps
        value = self.driver.download(self.session_id)["x"]
        assert value.tolist() == [self.model.value] * 3

    def teardown(self) -> None:
        for worker in list(self.streams):
            self._close(worker)
        self.stack.close()

    def _open(self, worker: int) -> None:
        stack = ExitStack()
        client_id = bytes([worker + 1]) * 16
        stream = stack.enter_context(
            self.driver.worker(self.session_id, worker, client_id=client_id)
        )
        assert stream.contribution == self.model.contribution(worker)
        assert stream.status.steps == self.model.steps
        self.streams[worker] = stream, stack

    def _close(self, worker: int) -> None:
        """Break a worker's stream off, also if it waits."""
        stream, stack = self.streams.pop(worker)
        stream.abandon()
        stack.close()
        self.waiting.pop(worker, None)

    def _settle(self, last: Future[StepAnswer]) -> None:
        """Look at the answers to a step that was applied."""
        for answer in (last, *self.waiting.values()):
            assert self._value_of(answer) == self.model.value
            assert answer.result().result.step == self.model.steps
            assert not answer.result().result.replayed
        self.waiting.clear()

    def _value_of(self, answer: Future[StepAnswer]) -> float:
        (value,) = set(answer.result(ANSWER_S).parameters["x"].tolist())
        return float(value)


def _gradients(content: float | None) -> Tensors:
    return {} if content is None else {"x": torch.full((3,), content, dtype=torch.float64)}


TestRepeats = Repeats.TestCase
TestRepeats.settings = settings(max_examples=60, stateful_step_count=40)
