"""All machines, in the order in which they run."""

from __future__ import annotations

from faults.machines.decoding import decode
from faults.machines.frame import Machine
from faults.machines.simulating import run_seeds

MACHINES = (
    Machine(
        name="decoders",
        summary="bytes that are nearly right, for all that decodes what strangers send",
        unit="inputs",
        whole_count=800_000,
        whole_s=120,
        test_count=10_000,
        run=decode,
    ),
    Machine(
        name="simulation",
        summary="clients, connections and threads of chance around the core, in one thread",
        unit="seeds",
        whole_count=10_000,
        whole_s=200,
        test_count=120,
        run=run_seeds,
    ),
)
