"""Clients that ask together for ten times what a server has.

The server keeps to its memory; whoever is let in finishes, bit for bit; whoever is not is told so,
and when to ask again; and who trained before goes on as if there were nobody else.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import grpc
import torch
from drivers import take
from drivers_grpc import StubDriver
from event_loop import TIMEOUT_S
from faults.machines.frame import Effort, Report
from refusals import RefusedError
from server_process import ServerProcess, running_server
from torch import Tensor

from optserve.allocator import KEPT_BYTES
from optserve.limits import MESSAGE_HEADROOM_BYTES
from optserve.v1.optimizer_pb2 import SGD, Optimizer
from optserve.v1.session_pb2 import SessionSpec
from optserve.v1.tensor_pb2 import DataType, TensorHeader

_T = TypeVar("_T")

KIB, MIB = 1 << 10, 1 << 20
MEMORY_BYTES_MAX = 128 * MIB
CALLS_MAX = 16
MESSAGE_BYTES_MAX = 2 * MIB
WINDOW_BYTES = 256 * KIB
ASKED_TIMES = 10  # Of what there is.
RESERVED_TIMES = 7  # A session of SGD with momentum reserves, of its parameters.
STEPS = 4
LR, MOMENTUM = 0.1, 0.9
PATIENCE_S = 10.0  # For how long a client that was refused asks again.


@dataclass(slots=True, kw_only=True)
class _Tally:
    """What has become of the clients."""

    finished: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def failed(self, what: str) -> None:
        with self.lock:
            self.failures.append(what)


class _Local:
    """The same steps with torch alone."""

    def __init__(self, seed: int, elements: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.parameter = torch.randn(elements, generator=self._generator)
        self._optimizer = torch.optim.SGD(
            [self.parameter], lr=LR, momentum=MOMENTUM, fused=True
        )  # As the server has it by default.

    @property
    def values(self) -> Mapping[str, Tensor]:
        return {"w": self.parameter.clone()}

    def step(self) -> Tensor:
        """Take a step, and return its gradient."""
        gradient = torch.randn(self.parameter.numel(), generator=self._generator)
        self.parameter.grad = gradient.clone()
        self._optimizer.step()
        return gradient


def overload(effort: Effort, given_bytes: int = MEMORY_BYTES_MAX) -> Report:
    """Let ``effort.count`` clients ask at once for ten times the memory.

    Args:
        effort: How many clients.
        given_bytes: What the server may have. More than it is held to: to see that it is noticed.
    """
    tally, begun, done = _Tally(), threading.Event(), threading.Event()
    elements = ASKED_TIMES * MEMORY_BYTES_MAX // effort.count // RESERVED_TIMES // 4
    with _server(given_bytes) as server, ThreadPoolExecutor(effort.count + 1) as pool:
        victim = pool.submit(_train_all_along, server, tally, begun, done)
        assert begun.wait(TIMEOUT_S)
        clients = [
            pool.submit(_ask, server, effort.seed + number, elements, tally, effort)
            for number in range(effort.count)
        ]
        for client in clients:
            client.result()
        done.set()
        slowest_s = victim.result()
        peak = server.peak_bytes()
    fitting = MEMORY_BYTES_MAX // (RESERVED_TIMES * elements * 4)
    allowed = _memory_limit(streams=fitting + 1, connections=effort.count + 1)
    if peak > allowed:
        tally.failed(f"the server took {peak >> 20} MiB; {allowed >> 20} are allowed")
    if not tally.finished:
        tally.failed("nobody was let in")
    if not tally.refusals:
        tally.failed("nobody was refused: it was no overload")
    refusals = ", ".join(f"{count} {reason}" for reason, count in sorted(tally.refusals.items()))
    return Report(
        tried=effort.count,
        acknowledged=tally.steps,
        notes=(
            f"{tally.finished} finished",
            f"refused {refusals}",
            f"{peak >> 20} of {allowed >> 20} MiB",
            f"slowest step of who was there before {slowest_s:.2f} s",
        ),
        failures=tuple(tally.failures),
    )


def _memory_limit(*, streams: int, connections: int) -> int:
    """Return what server/docs/operations.md says that the server takes at most.

    Args:
        streams: How many there can be, of sessions that there is room for.
        connections: How many clients there are.
    """
    process, kept = 256 * MIB, KEPT_BYTES
    under_way = 2 * MESSAGE_BYTES_MAX * (CALLS_MAX + streams)
    unread = (2 * WINDOW_BYTES + MIB + 64 * KIB) * connections
    return MEMORY_BYTES_MAX + process + kept + under_way + unread


@contextmanager
def _server(memory_bytes_max: int) -> Iterator[ServerProcess]:
    flags = {
        "--memory-bytes-max": memory_bytes_max,
        "--message-bytes-max": MESSAGE_BYTES_MAX,
        "--calls-max": CALLS_MAX,
        "--window-bytes": WINDOW_BYTES,
        "--threads": 2,
    }
    words = [str(word) for flag in flags.items() for word in flag]
    with running_server(*words) as server:
        yield server


def _ask(server: ServerProcess, seed: int, elements: int, tally: _Tally, effort: Effort) -> None:
    """Be one client: ask until let in or out of patience, then train, compare and leave."""
    local, choices = _Local(seed, elements), random.Random(seed)
    try:
        with StubDriver(server.address) as client:
            session_id = _create(client, local, choices, tally)
            if session_id:
                _train(client, session_id, local, choices, tally)
                _patiently(lambda: client.delete(session_id), choices, tally, TIMEOUT_S)
                with tally.lock:
                    tally.finished += 1
    except Exception as error:  # noqa: BLE001 - Whatever a client meets is a promise broken.
        tally.failed(f"client {seed}: {error!r}")
    finally:
        effort.advance(1)


def _create(client: StubDriver, local: _Local, choices: random.Random, tally: _Tally) -> str:
    """Return the id of a session with values; "" if there was no room for it."""
    size = local.parameter.nbytes
    values = local.values if size + MESSAGE_HEADROOM_BYTES <= MESSAGE_BYTES_MAX else None
    session = _patiently(lambda: client.create(_spec(local), values), choices, tally, PATIENCE_S)
    if session is None:
        return ""
    session_id = session.status.session_id
    if values is None:
        _patiently(lambda: client.upload(session_id, local.values), choices, tally, TIMEOUT_S)
    return session_id


def _patiently(
    act: Callable[[], _T], choices: random.Random, tally: _Tally, patience_s: float
) -> _T | None:
    """Do what may be refused for want of room, again and again; None if there was none."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            return act()
        except RefusedError as error:
            if error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED or not error.retry_after_s:
                raise
            with tally.lock:
                tally.refusals[error.reason] += 1
            # Sooner than told, and so harder on the server.
            time.sleep(choices.uniform(0.1, 0.5) * min(error.retry_after_s, 1.0))
    return None


def _train(
    client: StubDriver, session_id: str, local: _Local, choices: random.Random, tally: _Tally
) -> None:
    """Take some steps, and compare each with torch's."""
    with client.worker(session_id) as worker:
        for step in range(1, STEPS + 1):
            came = take(worker, step, {"w": local.step()})
            _compare(came.parameters["w"], local, f"session {session_id}, step {step}", tally)
            with tally.lock:
                tally.steps += 1
            time.sleep(choices.uniform(0, 0.1))


def _compare(came: Tensor, local: _Local, where: str, tally: _Tally) -> None:
    other = (came != local.parameter).nonzero().view(-1)
    if other.numel():
        tally.failed(
            f"{where}: {other.numel()} of {came.numel()} elements differ from torch's, the first"
            f" at {int(other[0])}, the last at {int(other[-1])}"
        )


def _train_all_along(
    server: ServerProcess, tally: _Tally, begun: threading.Event, done: threading.Event
) -> float:
    """Train beside all of it; return how long the slowest step took."""
    slowest_s, step, local = 0.0, 0, _Local(0, 1_000)
    with StubDriver(server.address) as client:
        session_id = client.create(_spec(local), local.values).status.session_id
        with client.worker(session_id) as worker:
            begun.set()
            while not done.is_set():
                step, gradient = step + 1, local.step()
                started_s = time.monotonic()
                came = take(worker, step, {"w": gradient})
                slowest_s = max(slowest_s, time.monotonic() - started_s)
                _compare(came.parameters["w"], local, f"who was there before, step {step}", tally)
                time.sleep(0.01)
        with tally.lock:
            tally.steps += step
    return slowest_s


def _spec(local: _Local) -> SessionSpec:
    header = TensorHeader(
        name="w", data_type=DataType.DATA_TYPE_FP32, shape=[local.parameter.numel()]
    )
    optimizer = Optimizer(sgd=SGD(lr=LR, momentum=MOMENTUM))
    return SessionSpec(parameters=[header], optimizer=optimizer)
