"""Connections that end at any byte, in every way, under clients that go on by themselves."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from random import Random

from bad_wire import BadWire, End, Fate, bad_wire
from faults.machines.courses import (
    LARGE,
    MIDDLE,
    SMALL,
    Course,
    attend,
    connected,
    create,
    tensors_of,
)
from faults.machines.frame import Effort, Report
from faults.machines.history import Entry, Verdict, judge
from server_process import ServerProcess, running_server

import optserve_client as optserve

_AT_ONCE = 4
_STEPS = 12
_CUTS_MAX = 10  # Of one client: then its wire is good, and it comes to its end.
_STALL_S = 0.3
_FIRST_BYTES = 30  # In the middle of the greeting of HTTP/2.
_SLICES: Sequence[int | None] = (None, None, 1_000, 20_000)
_LATENCIES_S = (0.0, 0.0, 0.0, 0.003)
_CONFIG = optserve.ClientConfig(
    lane="grpc", retry=optserve.Retry(backoff_s=0.01, backoff_max_s=0.1)
)


def cut(effort: Effort) -> Report:
    """Cut connections until it is enough; each client must come to its end."""
    ended: Counter[End] = Counter()
    verdicts: list[Verdict] = []
    failures: list[str] = []
    with running_server() as server, ThreadPoolExecutor(_AT_ONCE) as pool:
        numbers = itertools.count()
        while ended.total() < effort.count:
            batch = [Random(f"{effort.seed} {next(numbers)}") for _ in range(_AT_ONCE)]
            for done, verdict in pool.map(partial(_train, server), batch):
                verdicts.append(verdict)
                ended += done
                effort.advance(done.total())
        if "internal error" in server.log.read_text(encoding="utf-8"):
            failures.append(f"the server was at fault: {server.log.read_text(encoding='utf-8')}")
    ways = ", ".join(f"{ended[end]} {end}" for end in End)
    return Report(
        tried=ended.total(),
        acknowledged=sum(verdict.acknowledged for verdict in verdicts),
        lost=sum(verdict.lost for verdict in verdicts),
        doubled=sum(verdict.doubled for verdict in verdicts),
        notes=(f"{len(verdicts)} sessions", ways),
        failures=(*failures, *(each for verdict in verdicts for each in verdict.failures)),
    )


def _train(server: ServerProcess, random: Random) -> tuple[Counter[End], Verdict]:
    """Train a session over bad wires; return how they ended, and what the history proves."""
    workers = random.choice([1, 1, 2])
    course = Course.of(random, sizes=[SMALL, MIDDLE, LARGE], workers=workers, steps=_STEPS)
    log: list[Entry] = []
    with ExitStack() as stack:
        wires = [
            stack.enter_context(_wire(server, course, random.getrandbits(32)))
            for _ in range(workers)
        ]
        clients = [stack.enter_context(connected(wire.address, _CONFIG)) for wire in wires]
        first = create(clients[0], course)
        others = [
            client.join_session(first.session_id, worker=worker, via=course.via)
            for worker, client in enumerate(clients[1:], start=1)
        ]
        with ThreadPoolExecutor(workers) as pool:
            for attending in [
                pool.submit(attend, session, course, worker, log)
                for worker, session in enumerate([first, *others])
            ]:
                attending.result()
        ended = sum((wire.ended for wire in wires), Counter())
    with optserve.connect(server.address, config=_CONFIG, progress=False) as client:
        session = client.join_session(first.session_id)
        verdict = judge(log, course.training(), session.steps, tensors_of(session.parameters))
        session.delete()
    return ended, verdict


def _wire(server: ServerProcess, course: Course, seed: int) -> AbstractContextManager[BadWire]:
    return bad_wire(server.address, lambda number: _fate(course, seed, number), seed=seed)


def _fate(course: Course, seed: int, number: int) -> Fate:
    """Return what becomes of a client's connection: it lasts for some steps at most."""
    random = Random(f"{seed} {number}")
    if number >= _CUTS_MAX:
        return Fate()
    most = math.log(4 * course.byte_count + 5_000)
    return Fate(
        latency_s=random.choice(_LATENCIES_S),
        slice_bytes_max=random.choice(_SLICES),
        end=random.choice(list(End)),
        end_after_bytes=round(math.exp(random.uniform(math.log(_FIRST_BYTES), most))),
        end_upward=random.random() < 0.5,
        stall_s=_STALL_S,
    )
