"""All benchmarks, in the order in which they run."""

from __future__ import annotations

from benchmarks import bulk, capped, cuda, durability, memory, sessions, small
from benchmarks.conditions import Benchmark

BENCHMARKS = (
    Benchmark(
        name="capped",
        summary="25 M parameters over a link of 2 Gbit/s: the line rate, torch RPC (needs root)",
        run=capped.capped,
    ),
    Benchmark(
        name="loopback",
        summary="25 M parameters over loopback TCP: raw sockets, torch RPC, Ray, gRPC + torch.save",
        run=bulk.loopback,
    ),
    Benchmark(
        name="shared-memory",
        summary="25 M parameters through shared memory: the local step, torch RPC's own",
        run=bulk.shared_memory,
    ),
    Benchmark(
        name="small",
        summary="1 k parameters: a bare grpc.aio ping-pong of the same bytes",
        run=small.small,
    ),
    Benchmark(
        name="sessions",
        summary="1,000 sessions of 10 k parameters, 64 active at once: rate, memory",
        run=sessions.sessions,
    ),
    Benchmark(
        name="memory",
        summary="25 M parameters, Adam: the server's peak memory",
        run=memory.memory,
    ),
    Benchmark(
        name="growth",
        summary="1 M to 100 M parameters: how far the time of a step is from a line",
        run=bulk.growth,
    ),
    Benchmark(
        name="durability",
        summary="25 M and 10 k parameters, 64 sessions, restarts: journals and snapshots on disk",
        run=durability.durability,
    ),
    Benchmark(
        name="sizes",
        summary="1 k to 100 M parameters: everybody (no row of its own)",
        run=bulk.sizes,
        thorough_only=True,
    ),
    Benchmark(
        name="cuda",
        summary="25 M parameters on a CUDA device: the copies and the update alone",
        run=cuda.cuda,
        thorough_only=True,
    ),
)
