"""Seeds of the simulation, and bugs planted to see whether it would find them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
from faults.machines.frame import FAULTY, Effort, Report
from faults.machines.simulation.planted import PLANTED
from faults.machines.simulation.world import Outcome, simulate

_PROCESSES = 2
_BATCH = 25  # Seeds that a process takes at a time.
# Until a planted bug has to be found: most are by the third, "leave half a record" by some 1,700.
_PLANTED_SEEDS_MAX = 10_000
_LINES_SHOWN = 30


def run_seeds(effort: Effort) -> Report:
    """Run seeds from the first one on; then one after the other with each planted bug."""
    failures = [] if _repeats(effort.seed) else [f"seed {effort.seed} is not the same twice"]
    seeds = range(effort.seed, effort.seed + effort.count)
    acknowledged = lost = doubled = 0
    for outcome in _outcomes(seeds, parallel=effort.thorough):
        acknowledged += outcome.verdict.acknowledged
        lost += outcome.verdict.lost
        doubled += outcome.verdict.doubled
        if not outcome.ok:
            failures.append(_story(outcome))
        effort.advance(1)
    missed = [name for name in PLANTED if not _is_caught(name, effort.seed)]
    failures += [f"planted, and not caught: {name}" for name in missed]
    return Report(
        tried=effort.count,
        acknowledged=acknowledged,
        lost=lost,
        doubled=doubled,
        notes=(f"planted {len(PLANTED)}, caught {len(PLANTED) - len(missed)}",),
        failures=tuple(failures),
    )


def _outcomes(seeds: Iterable[int], *, parallel: bool) -> Iterator[Outcome]:
    if not parallel:
        yield from map(simulate, seeds)
        return
    with ProcessPoolExecutor(
        _PROCESSES,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        yield from pool.map(simulate, seeds, chunksize=_BATCH)


def _repeats(seed: int) -> bool:
    """Return whether a seed is the same twice, to the last event."""
    return simulate(seed).trace == simulate(seed).trace


def _is_caught(name: str, seed: int) -> bool:
    """Return whether a planted bug is found within some seeds."""
    bug = PLANTED[name]
    with bug.plant():
        seeds = range(seed, seed + _PLANTED_SEEDS_MAX)
        return any(not simulate(each, bug.promises).ok for each in seeds)


def _story(outcome: Outcome) -> str:
    """Say what went wrong, and how to see it again; all of what happened goes into a file."""
    FAULTY.mkdir(parents=True, exist_ok=True)
    path = FAULTY / f"simulation-{outcome.seed}.txt"
    path.write_text("\n".join(outcome.trace), encoding="utf-8")
    return "\n".join(
        [
            f"seed {outcome.seed}: {'; '.join([*outcome.failures, *outcome.verdict.failures])}",
            *(f"  {line}" for line in outcome.trace[-_LINES_SHOWN:]),
            f"  all of it: {path}",
            f'  again: make soak ARGS="--only simulation --seed {outcome.seed} --count 1"',
        ]
    )
