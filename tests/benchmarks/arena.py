"""Where contenders compete: each in its own processes, in turn, and nobody's result unchecked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from benchmarks.figures import Comparison, Timing
from benchmarks.job import TESTS, Job
from benchmarks.training import OptimizerName, Outcome, Reference

Report: TypeAlias = Callable[[str], None]
"""Is told, in a line, what goes on."""

_END_TIMEOUT_S = 30.0
_LOG_CHARS = 4_000  # Of what a contender has printed, at its end.


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How often things are measured."""

    rounds: int
    steps: int
    """In each round, for each contender."""
    warmup_steps: int = 3
    """Before the first round: the first steps make optimizer state, buffers and connections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Somebody who takes the steps."""

    name: str
    peer: str
    options: Mapping[str, str] = field(default_factory=dict)
    outcome: Outcome = field(default_factory=Outcome)
    parameters: int = 0
    """About how many parameters its model has; 0: as many as everybody's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where servers and clients run: on loopback, or in two network namespaces."""

    host: str = "127.0.0.1"
    server_prefix: tuple[str, ...] = ()
    client_prefix: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """The same work for several contenders."""

    name: str
    title: str
    parameters: int
    optimizer: OptimizerName
    contenders: Sequence[Contender]
    threads: int
    """How many cores torch uses, in every process that steps."""
    place: Place = field(default_factory=Place)

    def job_of(self, contender: Contender) -> Job:
        """Return what this contender is told."""
        return Job(
            peer=contender.peer,
            parameters=contender.parameters or self.parameters,
            optimizer=self.optimizer,
            threads=self.threads,
            host=self.place.host,
            server_prefix=self.place.server_prefix,
            options=contender.options,
        )


def compete(contest: Contest, effort: Effort, report: Report) -> Comparison:
    """Let all contenders take the same steps, round by round, and check what they have come to.

    All are set up before the first round, and wait while another one works. Each round begins with
    another contender, so that nobody always follows the same one.

    Raises:
        WrongParametersError: A contender has come to other parameters than torch.
        ContenderError: A contender broke down.
    """
    skipped: dict[str, str] = {}
    times: dict[str, list[tuple[float, ...]]] = {}
    with ExitStack() as stack:
        workers: dict[str, _Worker] = {}
        for contender in contest.contenders:
            report(f"{contest.name}: starting {contender.name}")
            job = contest.job_of(contender)
            worker = stack.enter_context(_running(job, contest.place.client_prefix))
            skipped[contender.name] = worker.begin()
            if not skipped[contender.name]:
                workers[contender.name] = worker
                times[contender.name] = []
                worker.steps(range(effort.warmup_steps))
        for number in range(effort.rounds):
            report(f"{contest.name}: round {number + 1} of {effort.rounds}")
            first = effort.warmup_steps + number * effort.steps
            for name in _rotated(list(workers), number):
                times[name].append(workers[name].steps(range(first, first + effort.steps)))
        report(f"{contest.name}: checking the parameters")
        total = effort.warmup_steps + effort.rounds * effort.steps
        _check(contest, workers, total)
    return Comparison(
        name=contest.name,
        title=contest.title,
        optimizer=contest.optimizer,
        timings=tuple(
            _timing(contest, each, times.get(each.name, []), skipped[each.name])
            for each in contest.contenders
        ),
    )


class ContenderError(Exception):
    """A contender's process has failed; the message is its traceback."""


class _Worker:
    """The client process of a contender."""

    def __init__(self, job: Job, process: subprocess.Popen[str], log: Path) -> None:
        self._job = job
        self._process = process
        self._log = log

    def begin(self) -> str:
        """Wait until it is ready; return why it is not, if it cannot run here."""
        return str(self._answer().get("skipped", ""))

    def steps(self, steps: range) -> tuple[float, ...]:
        """Let it take these steps; return the seconds that each took.

        Then it is stopped, with all its processes, until it is asked again: some wait by looking
        all the time whether something has come, and would take a core from those whose turn it is.
        """
        self.resume()
        times_s = tuple(self._ask({"steps": [steps.start, steps.stop]})["times_s"])
        self._signal(signal.SIGSTOP)
        return times_s

    def resume(self) -> None:
        """Let its processes run."""
        self._signal(signal.SIGCONT)

    def parameters(self) -> dict[str, Any]:
        """Return what it has come to."""
        self.resume()
        # On disk: a pipe would carry them no better, and a reader can map them.
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            path = Path(folder, "parameters.npz")
            self._ask({"save": str(path)})
            with np.load(path) as arrays:
                return dict(arrays)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # The answer says why.
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "it has ended"}
        if "error" in answer:
            log = self._log.read_text(encoding="utf-8", errors="replace")[-_LOG_CHARS:]
            told = f"{self._job.peer} {dict(self._job.options)}"
            raise ContenderError(f"{told}: {answer['error']}\n{log}")
        return answer


@contextmanager
def _running(job: Job, prefix: Sequence[str]) -> Iterator[_Worker]:
    """Start a client process; at the end everything that it has started is gone, too."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        log = Path(folder, "log")
        with log.open("wb") as log_file:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "benchmarks.worker", "work", job.to_json()],
                cwd=TESTS,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                text=True,
                start_new_session=True,  # Ctrl-C in the terminal is for us; its servers go with it.
            )
        with process:  # Closes the pipes.
            worker = _Worker(job, process, log)
            try:
                yield worker
            finally:
                worker.resume()
                _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()  # Then it stops its servers, and ends by itself.
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_TIMEOUT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _check(contest: Contest, workers: Mapping[str, _Worker], steps: int) -> None:
    references: dict[int, Reference] = {}
    for contender in contest.contenders:
        if contender.name in workers:
            job = contest.job_of(contender)
            if job.parameters not in references:
                references[job.parameters] = Reference(job.model(), job.optimizer, steps)
            parameters = workers[contender.name].parameters()
            references[job.parameters].check(parameters, contender.outcome, contender.name)


def _timing(
    contest: Contest, contender: Contender, rounds_s: list[tuple[float, ...]], skipped: str
) -> Timing:
    model = contest.job_of(contender).model()
    return Timing(
        contender=contender.name,
        parameters=model.parameters,
        tensors=len(model.shapes),
        rounds_s=tuple(rounds_s),
        checked="" if skipped else contender.outcome.told(),
        skipped=skipped,
    )


def _rotated(names: list[str], by: int) -> list[str]:
    at = by % len(names) if names else 0
    return names[at:] + names[:at]
