"""Calls whose messages are nearly right, over a socket, beside a session that trains.

Each call must end in time, in OK or in a status with a reason that is not INTERNAL; and the session
beside them must come to torch's parameters, to the last bit.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from random import Random
from threading import Event
from typing import Any

import grpc
from faults.machines.courses import SMALL, Course, attend, create, tensors_of
from faults.machines.frame import Effort, Report
from faults.machines.history import Entry, Verdict, judge
from faults.machines.mutation import mutated
from faults.machines.valid import SERVICE, requests
from google.protobuf.descriptor import MethodDescriptor
from messages import messages_of
from refusals import RefusedError
from scenarios.models import B_GROUP, model, spec
from server_process import ServerProcess, running_server

import optserve_client as optserve
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.loss_pb2 import CrossEntropyLoss
from optserve.v1.optimizer_pb2 import Adam
from optserve.v1.optimizer_service_pb2_grpc import OptimizerServiceStub

_CALLERS = 3
_HANG_S = 30.0  # Of one call: it takes milliseconds.
_EVENTS_MAX = 20  # Of one stream.
_MUTATED_SHARE = 0.3  # Of the events of a stream: else none would come far.
_CALLS_OF_A_SESSION = 100  # Then there is another one: this one may be gone.
_STEPS = 100
_IDLE_S = 3.0
_FLAGS = (
    *("--memory-bytes-max", "512MB", "--session-bytes-max", "64MB", "--sessions-max", "200"),
    *("--idle-timeout-s", f"{_IDLE_S}", "--round-timeout-s", "1", "--stall-timeout-s", "2"),
)
_CONFIG = optserve.ClientConfig(lane="grpc")


class AtFaultError(Exception):
    """The server has not answered as it must."""


def call(effort: Effort) -> Report:
    """Call with messages that are nearly right, until it is enough."""
    share = -(-effort.count // _CALLERS)
    failures: list[str] = []
    answers: Counter[str] = Counter()
    done = Event()
    with (
        running_server(*_FLAGS) as server,
        ThreadPoolExecutor(_CALLERS + 1) as pool,
    ):
        beside = pool.submit(_train, server, effort.seed, done)
        callers = [
            pool.submit(_Caller(server, f"{effort.seed} {i}", effort.advance).run, share)
            for i in range(_CALLERS)
        ]
        for caller in callers:
            try:
                answers += caller.result()
            except (AtFaultError, grpc.RpcError) as error:
                failures.append(str(error))
        done.set()
        verdicts = beside.result()
        log = server.log.read_text(encoding="utf-8")
        failures += [line for line in log.splitlines() if "internal error" in line]
    return Report(
        tried=answers.total(),
        acknowledged=sum(verdict.acknowledged for verdict in verdicts),
        lost=sum(verdict.lost for verdict in verdicts),
        doubled=sum(verdict.doubled for verdict in verdicts),
        notes=(f"{len(answers)} different answers", f"{answers['OK']} of them to be taken"),
        failures=(*failures, *(each for verdict in verdicts for each in verdict.failures)),
    )


class _Caller:
    """Calls one method after the other."""

    def __init__(self, server: ServerProcess, name: str, advance: Callable[[int], None]) -> None:
        self._address = server.address
        self._random = Random(name)
        self._advance = advance
        self._messages: Mapping[str, Sequence[bytes]] = {}
        self._sent = 0

    def run(self, count: int) -> Counter[str]:
        """Send so many messages; return how the calls were answered."""
        answers: Counter[str] = Counter()
        with grpc.insecure_channel(self._address) as channel:
            while self._sent < count:
                self._renew(OptimizerServiceStub(channel))
                for _ in range(_CALLS_OF_A_SESSION):
                    method = self._random.choice(list(SERVICE.methods))
                    before = self._sent
                    answer = self._call(channel, method)
                    answers[answer] += self._sent - before
                    self._advance(self._sent - before)
        return answers

    def _renew(self, stub: OptimizerServiceStub) -> None:
        """Have another session to call about; the ones before go when they have been idle."""
        request = pb.CreateSessionRequest(
            spec=spec(Adam(lr=0.1), groups=[B_GROUP], loss=CrossEntropyLoss()),
            values=messages_of(model()),
        )
        while True:
            try:
                response = stub.CreateSession(request, timeout=_HANG_S)
            except grpc.RpcError as error:
                if RefusedError.from_call(error).reason not in {"TOO_MANY", "MEMORY_EXHAUSTED"}:
                    raise
                time.sleep(_IDLE_S / 5)  # What the calls have made will go.
                continue
            break
        self._messages = {
            name: [request.SerializeToString() for request in valid]
            for name, valid in requests(response.session.status.session_id).items()
        }

    def _call(self, channel: grpc.Channel, method: MethodDescriptor) -> str:
        """Call a method; return how it was answered: OK, or the reason."""
        path = f"/{SERVICE.full_name}/{method.name}"
        kinds: dict[tuple[bool, bool], Callable[[str], Any]] = {
            (False, False): channel.unary_unary,
            (False, True): channel.unary_stream,
            (True, False): channel.stream_unary,
            (True, True): channel.stream_stream,
        }
        undecoded = kinds[method.client_streaming, method.server_streaming](path)
        valid = self._messages[method.name]
        sent = list(self._events(valid) if method.client_streaming else self._one(valid))
        try:
            answer = undecoded(iter(sent) if method.client_streaming else sent[0], timeout=_HANG_S)
            if method.server_streaming:
                for _ in answer:
                    pass
        except grpc.RpcError as error:
            refused = RefusedError.from_call(error)
            if refused.reason in {"", "INTERNAL"}:
                what = b"|".join(sent).hex()
                raise AtFaultError(f"{method.name}: {refused.code} {refused}: {what}") from error
            return refused.reason
        return "OK"

    def _one(self, valid: Sequence[bytes]) -> Iterator[bytes]:
        self._sent += 1
        yield mutated(self._random, valid)

    def _events(self, valid: Sequence[bytes]) -> Iterator[bytes]:
        """Yield events in their order, some of them wrong, missing, or there twice."""
        for event in itertools.islice(itertools.cycle(valid), self._random.randint(1, _EVENTS_MAX)):
            for _ in range(self._random.choice([0, 1, 1, 1, 1, 1, 2])):
                wrong = self._random.random() < _MUTATED_SHARE
                self._sent += 1
                yield mutated(self._random, [event, *valid]) if wrong else event


def _train(server: ServerProcess, seed: int, done: Event) -> list[Verdict]:
    """Train one session after the other, as if there were nobody else."""
    verdicts: list[Verdict] = []
    with optserve.connect(server.address, config=_CONFIG, progress=False) as client:
        while not (verdicts and done.is_set()):
            random = Random(f"{seed} beside {len(verdicts)}")
            course = Course.of(random, sizes=[SMALL], workers=1, steps=_STEPS)
            log: list[Entry] = []
            session = create(client, course)
            attend(session, course, 0, log)
            seen = tensors_of(session.download())
            verdicts.append(judge(log, course.training(), session.steps, seen))
            session.delete()
    return verdicts
