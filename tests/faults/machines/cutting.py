"""Connections that end at any byte, in every way, under clients that go on by themselves."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from random import Random
from typing import Literal, TypeAlias

from bad_wire import BadWire, End, Fate, bad_wire
from faults.machines.courses import (
    LARGE,
    MIDDLE,
    SMALL,
    Attendee,
    Course,
    attend,
    connected,
    create,
    tensors_of,
)
from faults.machines.frame import Effort, Report
from faults.machines.history import Entry, Verdict, judge
from faults.machines.node_worker import NodeWorker, why_there_is_no_node
from server_process import ServerProcess, running_server

import optserve_client as optserve

_Client: TypeAlias = Literal["blocking", "asyncio", "Node"]

_PYTHON: Sequence[_Client] = ("blocking", "asyncio")
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
    missing = why_there_is_no_node()
    clients = _PYTHON if missing else [*_PYTHON, "Node"]
    ended: Counter[End] = Counter()
    trained: Counter[_Client] = Counter()
    verdicts: list[Verdict] = []
    failures: list[str] = []
    with running_server() as server, ThreadPoolExecutor(_AT_ONCE) as pool:
        numbers = itertools.count()
        while ended.total() < effort.count:
            batch = [Random(f"{effort.seed} {next(numbers)}") for _ in range(_AT_ONCE)]
            for done, kinds, verdict in pool.map(partial(_train, server, clients), batch):
                verdicts.append(verdict)
                ended += done
                trained += kinds
                effort.advance(done.total())
        if "internal error" in server.log.read_text(encoding="utf-8"):
            failures.append(f"the server was at fault: {server.log.read_text(encoding='utf-8')}")
    ways = ", ".join(f"{ended[end]} {end}" for end in End)
    who = ", ".join(f"{trained[client]} {client}" for client in clients)
    without = (f"no Node client: {missing}",) if missing else ()
    return Report(
        tried=ended.total(),
        acknowledged=sum(verdict.acknowledged for verdict in verdicts),
        lost=sum(verdict.lost for verdict in verdicts),
        doubled=sum(verdict.doubled for verdict in verdicts),
        notes=(f"{len(verdicts)} sessions", f"clients: {who}", *without, ways),
        failures=(*failures, *(each for verdict in verdicts for each in verdict.failures)),
    )


def _train(
    server: ServerProcess, clients: Sequence[_Client], random: Random
) -> tuple[Counter[End], Counter[_Client], Verdict]:
    """Train a session over bad wires.

    Returns:
        How they ended, what clients trained, and what the history proves.
    """
    workers = random.choice([1, 1, 2])
    course = Course.of(random, sizes=[SMALL, MIDDLE, LARGE], workers=workers, steps=_STEPS)
    log: list[Entry] = []
    with ExitStack() as stack:
        wires = [
            stack.enter_context(_wire(server, course, random.getrandbits(32)))
            for _ in range(workers)
        ]
        with connected(wires[0].address, _CONFIG) as client:
            session_id = create(client, course).session_id
        kinds = [random.choice(clients) for _ in wires]
        attendees = [
            stack.enter_context(_joined(kind, wire.address, session_id, worker, course))
            for worker, (kind, wire) in enumerate(zip(kinds, wires, strict=True))
        ]
        with ThreadPoolExecutor(workers) as pool:
            for attending in [
                pool.submit(attend, attendee, course, worker, log)
                for worker, attendee in enumerate(attendees)
            ]:
                attending.result()
        ended = sum((wire.ended for wire in wires), Counter())
    with optserve.connect(server.address, config=_CONFIG, progress=False) as client:
        session = client.join_session(session_id)
        verdict = judge(log, course.training(), session.steps, tensors_of(session.parameters))
        session.delete()
    return ended, Counter(kinds), verdict


@contextmanager
def _joined(
    kind: _Client, address: str, session_id: str, worker: int, course: Course
) -> Iterator[Attendee]:
    """Take part in a session, with a client of some kind."""
    if kind == "Node":
        with NodeWorker.joined(
            address, session_id, worker, via=course.via, shapes=course.shapes
        ) as node:
            yield node
        return
    with connected(address, _CONFIG, kind) as client:
        yield client.join_session(session_id, worker=worker, via=course.via)


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
