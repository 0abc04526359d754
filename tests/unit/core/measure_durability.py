"""Measure what durability costs a step, and a restart: the numbers of decision 12.

    cd tests && ../.venv/bin/python -m unit.core.measure_durability [DIRECTORY]

Milliseconds, medians (and least) of steps of the modes in turn, through the core and onto a disk,
without gRPC. The directory is where to measure; a temporary one by default.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from optserve_server.core.actor import SessionActor
from optserve_server.core.device import Device
from optserve_server.core.events import NullObserver
from optserve_server.core.limits import Limits
from optserve_server.core.optimizers import OPTIMIZERS, effective_hyperparameters
from optserve_server.core.persistence import Persistence
from optserve_server.core.registry import SessionRegistry
from optserve_server.core.resolve import SpecRequest, resolve
from optserve_server.core.spec import Choice, Durability, DurabilityMode
from optserve_server.core.storage import Origin
from optserve_server.core.surroundings import Surroundings
from optserve_server.core.tensors import TensorSpec
from optserve_server.storage.disk import LocalDisk
from optserve_server.storage.local import LocalStorage

SIZES = {1_000: 400, 100_000: 200, 1_000_000: 60, 25_000_000: 12}
"""Elements, and how many steps of each mode are measured."""
MODES = {
    "none": Durability(),
    "snapshot, 100 steps": Durability(mode=DurabilityMode.SNAPSHOT, snapshot_steps=100),
    "journal": Durability(mode=DurabilityMode.JOURNAL),
    "journal, fsync": Durability(mode=DurabilityMode.JOURNAL, fsync=True),
}


def _registry(folder: Path, executor: ThreadPoolExecutor) -> SessionRegistry:
    origin = Origin(torch=str(torch.__version__), device="cpu")
    persistence = Persistence(
        storage=LocalStorage(LocalDisk(folder), origin), executor=executor, origin=origin
    )
    return SessionRegistry(
        Limits(),
        Surroundings(
            device=Device("cpu"),
            executor=executor,
            clock=time.time,
            observer=NullObserver(),
            persistence=persistence,
        ),
    )


async def _step(actor: SessionActor, step: int) -> float:
    contribution = actor.begin(0, step, None)
    for target in contribution.targets:
        target.fill_(1.0)
    started = time.perf_counter()
    await actor.commit(contribution)
    return (time.perf_counter() - started) * 1e3


async def _measured(folder: Path, elements: int, count: int) -> tuple[list[str], float]:
    """Return a row of the table, and how long the session with a journal takes to come back."""
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(2,)) as executor:
        registry = _registry(folder, executor)
        kind = OPTIMIZERS["Adam"]
        actors = {}
        for name, durability in MODES.items():
            request = SpecRequest(
                display_name="",
                parameters=[TensorSpec(name="w", dtype=torch.float32, shape=(elements,))],
                optimizer=Choice(kind="Adam", arguments=effective_hyperparameters(kind, {})),
                durability=durability,
            )
            values = {0: torch.zeros(elements)}
            actors[name] = await registry.create("", resolve(request, registry.limits), values)
        times: dict[str, list[float]] = {name: [] for name in MODES}
        for step in range(1, count + 1):
            for name, actor in actors.items():
                times[name].append(await _step(actor, step))
        journal = actors["journal"].archive
        assert journal is not None
        await journal.close()  # As a crash does: with no snapshot but the first one.
        await registry.settle()
        row = [f"{statistics.median(each):.2f} ({min(each):.2f})" for each in times.values()]
        again = SessionRegistry(registry.limits, registry.surroundings)
        await again.load()
        started = time.perf_counter()
        await again.find("", actors["journal"].session_id)
        restart_ms = (time.perf_counter() - started) * 1e3
        await again.settle()
        return row, restart_ms


def main() -> None:
    """Print the table."""
    parent = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.gettempdir())
    torch.set_num_threads(1)
    sys.stdout.write(f"| elements | {' | '.join(MODES)} | restart (steps in the journal) |\n")
    for elements, count in SIZES.items():
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            row, restart_ms = asyncio.run(_measured(Path(folder), elements, count))
        cells = [f"{elements:,}", *row, f"{restart_ms:.0f} ({count})"]
        sys.stdout.write(f"| {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
