"""Measure a preview of a large step, beside the step and beside a copy of all that it changes.

From the folder of the tests: ../.venv/bin/python -m unit.core.measure_previews
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optserve.allocator import keep_freed_memory
from optserve_server.core.device import Device
from optserve_server.core.optimizers import OPTIMIZERS, build, effective_hyperparameters
from optserve_server.core.preview import Cuts, Preview

ELEMENTS = 25_000_000
PIECES_AT_A_TIME = 4  # As rpc/ahead.py asks for them.
ROUNDS = 12
CASES: dict[str, dict[str, float]] = {"SGD": {"lr": 0.1, "momentum": 0.9}, "Adam": {}}


@dataclass(slots=True)
class _Standing:
    version: int = 0


def main() -> None:
    """Write medians of each, measured in turn."""
    kept = "kept" if keep_freed_memory() else "given back"
    threads = torch.get_num_threads()
    sys.stdout.write(f"{ELEMENTS:,} elements, {threads} threads; what is freed is {kept}\n")
    for name, given in CASES.items():
        sys.stdout.write("  ".join([f"{name:5}", *_measured(name, given)]) + "\n")


def _measured(name: str, given: dict[str, float]) -> list[str]:
    kind = OPTIMIZERS[name]
    parameter, gradient = torch.zeros(ELEMENTS), torch.randn(ELEMENTS)
    in_force = effective_hyperparameters(kind, given, [parameter.dtype])
    optimizer = build(kind, [([parameter], in_force)])

    cuts = Cuts([parameter], optimizer)

    def preview() -> None:
        ahead = Preview(_Standing(), cuts, kind, Device("cpu"))
        pieces = [(piece, gradient) for piece in ahead.pieces[0] or ()]
        for first in range(0, len(pieces), PIECES_AT_A_TIME):
            ahead.compute(pieces[first : first + PIECES_AT_A_TIME])

    def step() -> None:
        parameter.grad = gradient
        kind.step(optimizer)
        parameter.grad = None

    step()
    touched: list[Tensor] = [parameter]
    touched += [
        each for each in optimizer.state[parameter].values() if each.shape == parameter.shape
    ]
    images = [torch.zeros_like(each) for each in touched]

    def copy() -> None:
        for image, each in zip(images, touched, strict=True):
            image.copy_(each)

    works: dict[str, Callable[[], None]] = {"preview": preview, "step": step, "copy": copy}
    times_s: dict[str, list[float]] = {what: [] for what in works}
    for _ in range(ROUNDS):
        for what, work in works.items():
            started_s = time.perf_counter()
            work()
            times_s[what].append(time.perf_counter() - started_s)
    megabytes = sum(each.nbytes for each in images) / 1e6
    return [
        f"{what} {statistics.median(times) * 1e3:.1f} ms (least {min(times) * 1e3:.1f})"
        for what, times in times_s.items()
    ] + [f"copies take {megabytes:.0f} MB"]


if __name__ == "__main__":
    main()
