"""A server that is killed with -9, at random moments and at the worst ones, under load."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from random import Random
from threading import Event

from faces import Face
from faults.machines.courses import MIDDLE, SMALL, Course, attend, connected, create, tensors_of
from faults.machines.frame import Effort, Report
from faults.machines.history import Entry, Saw, Verdict, judge
from ports import kept_port
from server_process import ServerProcess, running_server

import optserve_client as optserve

_SESSIONS = 8
_STEPS = 60
_ROLLBACK_STEPS = 5
_LIFE_STEPS = 150  # What a server does, over all sessions, before it is killed: so much at most.
_LIFE_S = 15.0  # If it does not do so much.
_POLL_S = 0.005
_FAILPOINTS = (
    "change-unrecorded",
    "change-recorded",
    "change-made",
    "snapshot-half-written",
    "snapshot-written",
    "snapshot-renamed",
)
_REACHED_MAX = 40  # At which time a failpoint kills, at most.
_CONFIG = optserve.ClientConfig(
    lane="grpc", retry=optserve.Retry(backoff_s=0.02, backoff_max_s=0.2, give_up_after_s=300)
)
_FACES: Sequence[Face] = ("blocking", "asyncio")
_JOURNAL = optserve.Durability(mode="JOURNAL", snapshot_steps=20)
_FSYNC = optserve.Durability(mode="JOURNAL", snapshot_steps=20, fsync=True)
_SNAPSHOT = optserve.Durability(mode="SNAPSHOT", snapshot_steps=_ROLLBACK_STEPS)
_DURABILITIES: Sequence[optserve.Durability] = (*[_JOURNAL, _FSYNC] * 3, _SNAPSHOT, _SNAPSHOT)
"""Of the sessions that train at a time."""


class _Lives:
    """One server after the other, at one address and on one data directory."""

    def __init__(self, folder: str, port: int) -> None:
        self._folder, self._port = folder, port
        self._stack = ExitStack()
        self.server: ServerProcess
        self.begin("")
        self.address = self.server.address

    def begin(self, failpoint: str) -> None:
        """Start a server, which kills itself at a failpoint if one is named."""
        self.server = self._stack.enter_context(
            running_server(
                *("--data-dir", self._folder),
                environment={"OPTSERVE_FAILPOINTS": failpoint},
                port=self._port,
            )
        )

    def kill(self, is_time: Callable[[], bool]) -> str:
        """Kill the server when it is time, unless it has done so itself; return who did."""
        how, deadline_s = "at random moments", time.monotonic() + _LIFE_S
        while not is_time() and time.monotonic() < deadline_s:
            if self.server.process.poll() is not None:
                how = "at failpoints"
                break
            time.sleep(_POLL_S)
        self.server.process.kill()
        self.server.process.wait()
        self._check_log()
        self._stack.close()
        return how

    def end(self) -> None:
        """Stop the last one, properly."""
        self._check_log()
        self._stack.close()

    def _check_log(self) -> None:
        log = self.server.log.read_text(encoding="utf-8")
        assert "internal error" not in log, log


def kill(effort: Effort) -> Report:
    """Kill servers until it is enough; every session must come to torch's parameters."""
    random, enough, logs = Random(effort.seed), Event(), list[list[Entry]]()
    killed: Counter[str] = Counter()
    with (
        tempfile.TemporaryDirectory(prefix="optserve-kills-") as folder,
        kept_port() as port,
        ThreadPoolExecutor(_SESSIONS) as pool,
    ):
        lives = _Lives(folder, port)
        training = [
            pool.submit(_train, lives.address, durability, f"{effort.seed} {i}", enough, logs)
            for i, durability in enumerate(_DURABILITIES)
        ]
        try:
            while killed.total() < effort.count and not any(each.done() for each in training):
                wanted = _answers(logs) + random.randrange(_LIFE_STEPS)
                killed[lives.kill(partial(_have_come, logs, wanted))] += 1
                effort.advance(1)
                lives.begin(_failpoint(random))
            lives.kill(lambda: True)  # The last one may have a failpoint left.
            lives.begin("")
        finally:
            enough.set()
            found = [each.result() for each in training]
            lives.end()
    verdicts = [verdict for each in found for verdict in each]
    taken_back = sum(verdict.taken_back for verdict in verdicts)
    return Report(
        tried=killed.total(),
        acknowledged=sum(verdict.acknowledged for verdict in verdicts),
        lost=sum(verdict.lost for verdict in verdicts),
        doubled=sum(verdict.doubled for verdict in verdicts),
        notes=(
            f"{len(verdicts)} sessions",
            ", ".join(f"{count} {how}" for how, count in sorted(killed.items())),
            f"{taken_back} taken back as agreed, at most {_ROLLBACK_STEPS} at a time",
        ),
        failures=tuple(failure for verdict in verdicts for failure in verdict.failures),
    )


def _answers(logs: Sequence[Sequence[Entry]]) -> int:
    """Return about how many steps have been answered."""
    return sum(len(log) for log in logs) // 2  # Each was sent before.


def _have_come(logs: Sequence[Sequence[Entry]], wanted: int) -> bool:
    return _answers(logs) >= wanted


def _failpoint(random: Random) -> str:
    """Return where the next server kills itself; half of them do not."""
    if random.random() < 0.5:
        return ""
    return f"{random.choice(_FAILPOINTS)}=kill@{random.randint(1, _REACHED_MAX)}"


def _train(
    address: str,
    durability: optserve.Durability,
    name: str,
    enough: Event,
    logs: list[list[Entry]],
) -> list[Verdict]:
    """Train one session after the other; return what their histories prove."""
    verdicts = []
    with connected(address, _CONFIG, Random(name).choice(_FACES)) as client:
        for number in itertools.count():
            random = Random(f"{name} {number}")
            workers = 1 if durability is _SNAPSHOT else random.choice([1, 2])
            course = Course.of(random, sizes=[SMALL, MIDDLE], workers=workers, steps=_STEPS)
            verdicts.append(_take(client, address, course, durability, logs))
            if enough.is_set():
                break
    return verdicts


def _take(
    client: optserve.Client,
    address: str,
    course: Course,
    durability: optserve.Durability,
    logs: list[list[Entry]],
) -> Verdict:
    """Take a course to its end, and look at what has come of it."""
    rollback_max = _ROLLBACK_STEPS if durability is _SNAPSHOT else 0
    log: list[Entry] = []
    logs.append(log)
    first = create(client, course, durability)
    with ExitStack() as stack, ThreadPoolExecutor(course.workers) as pool:
        sessions = [first]
        for worker in range(1, course.workers):
            face = Random(course.name).choice(_FACES)
            other = stack.enter_context(connected(address, _CONFIG, face))
            sessions.append(other.join_session(first.session_id, worker=worker, via=course.via))
        for attending in [
            pool.submit(attend, session, course, worker, log)
            for worker, session in enumerate(sessions)
        ]:
            attending.result()
        for session in sessions:
            session.close()
    last = client.join_session(first.session_id)
    if rollback_max:  # It may have gone back once more: now its worker knows.
        log.append(Entry(worker=0, saw=Saw.TOLD, step=last.steps))
    training = course.training(rollback_max=rollback_max)
    verdict = judge(log, training, last.steps, tensors_of(last.parameters))
    with suppress(optserve.SessionNotFoundError):  # An answer was lost with the server.
        last.delete()
    return verdict
