"""Measure what sessions take while they come back from disk; prints JSON as measure_sessions."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import torch
from scenarios.models import spec
from unit.core.measuring import forget_peak, memory

from optserve.v1.optimizer_pb2 import SGD, Adam
from optserve.v1.session_pb2 import Durability, DurabilityMode
from optserve.v1.tensor_pb2 import Encoding
from optserve_server.core.admission import session_bytes
from optserve_server.core.changes import to_record
from optserve_server.core.device import Device
from optserve_server.core.limits import Limits
from optserve_server.core.persistence import Persistence
from optserve_server.core.recovery import recover
from optserve_server.core.session import Session
from optserve_server.core.spec import SessionSpec
from optserve_server.core.state import to_snapshot
from optserve_server.core.storage import Origin
from optserve_server.rpc.decode_spec import session_spec
from optserve_server.storage.disk import LocalDisk
from optserve_server.storage.local import LocalStorage

CPU, HERE = Device("cpu"), Origin(torch=torch.__version__, device="cpu")
SESSION_ID = "5e55"
ELEMENTS = 2_000_000
PIECES = 4


def main() -> None:
    """Measure each case, the first once more, for what torch takes at its first use."""
    cases = dict(_cases())
    gc.collect()
    gc.freeze()  # Or each collection would look through all of torch.
    with ThreadPoolExecutor(1) as executor:
        _measure(next(iter(cases.values())), executor)
        found = {name: _measure(spec, executor) for name, spec in cases.items()}
    sys.stdout.write(json.dumps(found))


def _cases() -> Iterator[tuple[str, SessionSpec]]:
    values = {f"w{i}": torch.zeros(ELEMENTS // PIECES) for i in range(PIECES)}
    optimizers = {"SGD": SGD(), "momentum": SGD(momentum=0.9), "Adam": Adam()}
    for name, optimizer in optimizers.items():
        wanted = spec(optimizer, parameters=values)
        wanted.durability.CopyFrom(Durability(mode=DurabilityMode.DURABILITY_MODE_JOURNAL))
        yield name, session_spec(wanted, Limits())
        wanted.wire.gradients = Encoding.ENCODING_BF16  # Such a session has no gradients to spare.
        yield f"{name} BF16", session_spec(wanted, Limits())


def _measure(wanted: SessionSpec, executor: Executor) -> tuple[int, int]:
    """Return what is reserved, and what a session takes that has a snapshot and a journal."""
    with tempfile.TemporaryDirectory() as directory:
        storage = LocalStorage(LocalDisk(Path(directory)), HERE)
        _write(wanted, storage)
        persistence = Persistence(storage=storage, executor=executor, origin=HERE)
        reserved = session_bytes(wanted, CPU.torch)
        gc.collect()
        before = memory("VmRSS")
        forget_peak()
        found = recover(SESSION_ID, persistence, CPU, Limits(), reserved_bytes=reserved)
        taken = memory("VmHWM") - before
        assert found.session.steps > found.saved_steps > 0
        found.store.close()
        storage.close()
    return reserved, taken


def _write(wanted: SessionSpec, storage: LocalStorage) -> None:
    session = Session(wanted, CPU, Limits())
    session.set_parameters({i: torch.ones(ELEMENTS // PIECES) for i in range(PIECES)})
    gradients = [torch.ones(ELEMENTS // PIECES) for _ in range(PIECES)]
    session.step(gradients)
    snapshot = to_snapshot(session.capture(copy=False), {"stepped_s": None})
    store = storage.create(SESSION_ID, {}, snapshot)
    session.recorder = lambda change, sequence: store.append(to_record(change, sequence, 0.0))  # type: ignore[assignment]
    for _ in range(2):
        session.step(gradients)
    store.close()


if __name__ == "__main__":
    main()
