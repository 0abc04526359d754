"""The server's metrics: every name, help text, label and bucket, and which event moves which.

Counters and histograms carry labels from short lists that are known from the start, so that a
series is there, at zero, before it first moves. What names a session is a gauge, is capped, and
goes with the session: see ``_SessionGauges``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from optserve_server.core.events import (
    Direction,
    LossEvaluated,
    Phase,
    RpcMethod,
    SessionOpened,
    StepApplied,
)
from optserve_server.telemetry.durability import DurabilityMetrics

__all__ = ["Build", "Metrics"]

# From the update of a small model on a CPU to waiting half a minute for another worker.
PHASE_BUCKETS_S = (
    *(1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)

# Unary calls end in milliseconds; a training stream is one call and lives for minutes or hours.
RPC_BUCKETS_S = (
    *(1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 60.0, 600.0, 3600.0),
)

# gRPC's status codes in their order, as Go writes them: the values of ``grpc_code``.
RPC_CODES = (
    *("OK", "Canceled", "Unknown", "InvalidArgument", "DeadlineExceeded", "NotFound"),
    *("AlreadyExists", "PermissionDenied", "ResourceExhausted", "FailedPrecondition", "Aborted"),
    *("OutOfRange", "Unimplemented", "Internal", "Unavailable", "DataLoss", "Unauthenticated"),
)

UNKEPT_SPLIT = "none"
"""``split`` of an evaluation that its session does not keep: it is counted, and is on no curve."""

GROUP_SERIES_MAX = (
    16  # A client chooses how many groups there are; its cost to a scrape is bounded.
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What is running: the labels of ``optserve_build_info``."""

    version: str
    """Version of optserve-server."""
    torch: str
    """Version of torch."""
    device: str
    """Device that new sessions live on, as torch names it: ``cuda:0``."""


class Metrics(DurabilityMetrics):
    """Observer that keeps the server's metrics.

    Args:
        registry: Shows the metrics; must not hold any of the same name.
        build: What is running.
        methods: The methods that are served.
        reasons: Names of ``optserve.v1.Reason`` without their prefix.
        optimizers: torch's names of the optimizers that sessions can have.
        sessions_max: How many sessions may have series of their own at a time.
        device_memory_bytes: Asked at every scrape, on another thread, for the memory that torch
            has allocated on the device. None: there is no such metric.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        build: Build,
        methods: Iterable[RpcMethod],
        reasons: Iterable[str],
        optimizers: Iterable[str],
        sessions_max: int,
        device_memory_bytes: Callable[[], float] | None = None,
    ) -> None:
        own = CollectorRegistry()
        counter, gauge = partial(Counter, registry=own), partial(Gauge, registry=own)

        info = Info("optserve_build", "What is running.", registry=own)
        steps = counter("optserve_steps_total", "Steps applied.", ["optimizer"])
        repeats = counter(
            "optserve_steps_repeated_total",
            "Steps sent again, which were answered and not applied again.",
            ["optimizer"],
        )
        phases = Histogram(
            "optserve_step_phase_duration_seconds",
            "Time that each part of a step took.",
            ["phase"],
            buckets=PHASE_BUCKETS_S,
            registry=own,
        )
        tensor_bytes = counter(
            "optserve_tensor_bytes_total", "Bytes of tensors received and sent.", ["direction"]
        )
        losses = counter("optserve_loss_evaluations_total", "Losses evaluated.", ["split"])
        refusals = counter(
            "optserve_refusals_total", "Calls, and steps of streams, refused.", ["reason"]
        )
        sessions = gauge("optserve_sessions", "Open sessions.", ["optimizer"])
        reserved = gauge(
            "optserve_reserved_bytes", "Memory reserved by sessions, uploads and loss evaluations."
        )
        dropped = counter(
            "optserve_session_metrics_dropped_total",
            "Sessions opened beyond the cap, which have no series of their own.",
        )
        super().__init__(own)
        if device_memory_bytes is not None:
            memory = gauge(
                "optserve_device_memory_allocated_bytes",
                "Memory that torch has allocated on the device.",
            )
            memory.set_function(device_memory_bytes)

        info.info({"version": build.version, "torch": build.torch, "device": build.device})
        optimizers = tuple(optimizers)
        self._steps = _Bound(steps.labels, optimizers)
        self._repeats = _Bound(repeats.labels, optimizers)
        self._phases = _Bound(phases.labels, Phase)
        self._tensor_bytes = _Bound(tensor_bytes.labels, Direction)
        self._losses = _Bound(losses.labels, ("train", "validation", UNKEPT_SPLIT))
        self._refusals = _Bound(refusals.labels, reasons)
        self._sessions = _Bound(sessions.labels, optimizers)
        self._reserved = reserved
        self._rpcs = _rpc_series(own, methods)
        self._session_gauges = _SessionGauges(own, sessions_max, dropped)
        registry.register(_WithoutCreated(own))  # Last: it asks for all names.

    def session_opened(self, event: SessionOpened) -> None:
        """Count it, and give it series of its own if there is room."""
        self._sessions[event.optimizer].inc()
        self._session_gauges.open(event)

    def session_closed(self, event: SessionOpened) -> None:
        """Count it no more, and take its series away."""
        self._sessions[event.optimizer].dec()
        self._session_gauges.close(event.session_id)

    def memory_reserved(self, reserved_bytes: int) -> None:
        """Show how much memory is promised."""
        self._reserved.set(reserved_bytes)

    def step_applied(self, event: StepApplied) -> None:
        """Count the step, and show it."""
        self._steps[event.optimizer].inc()
        self._session_gauges.step(event)

    def step_repeated(self, optimizer: str) -> None:
        """Count it."""
        self._repeats[optimizer].inc()

    def loss_evaluated(self, event: LossEvaluated) -> None:
        """Count the evaluation, and show it if it is kept."""
        self._losses[event.split].inc()
        if event.split != UNKEPT_SPLIT:
            self._session_gauges.loss(event)

    def phase_ended(self, phase: Phase, seconds: float) -> None:
        """Observe it."""
        self._phases[phase].observe(seconds)

    def bytes_moved(self, direction: Direction, count: int) -> None:
        """Count them."""
        self._tensor_bytes[direction].inc(count)

    def refused(self, reason: str) -> None:
        """Count it."""
        self._refusals[reason].inc()

    def rpc_started(self, method: RpcMethod) -> None:
        """Count it."""
        self._rpcs[method].started.inc()

    def rpc_handled(self, method: RpcMethod, code: str, seconds: float) -> None:
        """Count it by its code, and observe how long it took."""
        rpc = self._rpcs[method]
        rpc.handled[code].inc()
        rpc.seconds.observe(seconds)

    def message_received(self, method: RpcMethod) -> None:
        """Count it."""
        self._rpcs[method].received.inc()

    def message_sent(self, method: RpcMethod) -> None:
        """Count it."""
        self._rpcs[method].sent.inc()


_Key = TypeVar("_Key", bound=object)
_Child = TypeVar("_Child")


class _Bound(dict[_Key, _Child]):
    """Series by key, each looked up in its metric once; those of ``known`` keys at the start.

    Any other key gets its series when it first comes, so keys must not be a client's words.
    """

    def __init__(self, bind: Callable[[_Key], _Child], known: Iterable[_Key]) -> None:
        super().__init__((key, bind(key)) for key in known)
        self._bind = bind

    def __missing__(self, key: _Key) -> _Child:
        child = self[key] = self._bind(key)
        return child


@dataclass(frozen=True, slots=True, kw_only=True)
class _RpcSeries:
    """The series of one method."""

    started: Counter
    handled: _Bound[str, Counter]
    received: Counter
    sent: Counter
    seconds: Histogram


def _rpc_series(
    registry: CollectorRegistry, methods: Iterable[RpcMethod]
) -> _Bound[RpcMethod, _RpcSeries]:
    """Register the metrics of calls, named as go-grpc-prometheus does: its dashboards fit."""
    labels = ["grpc_type", "grpc_service", "grpc_method"]
    started = Counter(
        "grpc_server_started_total",
        "Total number of RPCs started on the server.",
        labels,
        registry=registry,
    )
    handled = Counter(
        "grpc_server_handled_total",
        "Total number of RPCs completed on the server, regardless of success or failure.",
        [*labels, "grpc_code"],
        registry=registry,
    )
    received = Counter(
        "grpc_server_msg_received_total",
        "Total number of RPC messages received on the server.",
        labels,
        registry=registry,
    )
    sent = Counter(
        "grpc_server_msg_sent_total",
        "Total number of RPC messages sent by the server.",
        labels,
        registry=registry,
    )
    seconds = Histogram(
        "grpc_server_handling_seconds",
        "Time from the start of an RPC to its end; a stream is one RPC.",
        labels,
        buckets=RPC_BUCKETS_S,
        registry=registry,
    )

    def bind(method: RpcMethod) -> _RpcSeries:
        values = (method.kind, method.service, method.method)
        return _RpcSeries(
            started=started.labels(*values),
            handled=_Bound(lambda code: handled.labels(*values, code), RPC_CODES),
            received=received.labels(*values),
            sent=sent.labels(*values),
            seconds=seconds.labels(*values),
        )

    return _Bound(bind, methods)


@dataclass(slots=True, kw_only=True)
class _ShownSession:
    """The last event of each kind that a session had, kept whole: a scrape sees no mixture."""

    opened: SessionOpened
    step: StepApplied | None = None
    losses: dict[str, LossEvaluated] = field(default_factory=dict)


class _SessionGauges(Collector):
    """What can be seen of single sessions, made from their last events when somebody asks.

    Each session costs its gauges at every scrape, so only ``sessions_max`` are shown at a time.
    Who comes later is counted as dropped and stays without, even when there is room again.
    """

    def __init__(self, registry: CollectorRegistry, sessions_max: int, dropped: Counter) -> None:
        self._sessions: dict[str, _ShownSession] = {}
        self._sessions_max = sessions_max
        self._dropped = dropped
        registry.register(self)

    def open(self, event: SessionOpened) -> None:
        """Show a session from now on, or count it as dropped."""
        if len(self._sessions) < self._sessions_max:
            self._sessions[event.session_id] = _ShownSession(opened=event)
        else:
            self._dropped.inc()

    def close(self, session_id: str) -> None:
        """Show a session no more."""
        self._sessions.pop(session_id, None)

    def step(self, event: StepApplied) -> None:
        """Remember a session's last step."""
        if shown := self._sessions.get(event.session_id):
            shown.step = event

    def loss(self, event: LossEvaluated) -> None:
        """Remember a session's last loss on a split."""
        if shown := self._sessions.get(event.session_id):
            shown.losses[event.split] = event

    def collect(self) -> Iterable[Metric]:
        """Make every gauge. A scrape calls it on a thread of its own: copy, then loop."""
        info = _family("info", "An open session; always 1.", "optimizer")
        step = _family("step", "Number of the session's last step.")
        time = _family("last_step_timestamp_seconds", "When the session's last step was applied.")
        norm = _family("gradient_norm", "Euclidean norm of the last gradient that was applied.")
        rate = _family(
            "learning_rate",
            f"Learning rate that the last step used, for the first {GROUP_SERIES_MAX} groups.",
            "group",
        )
        loss = _family("loss", "Last loss on each split.", "split")
        accuracy = _family("accuracy_ratio", "Last accuracy on each split, from 0 to 1.", "split")

        for session_id, shown in tuple(self._sessions.items()):
            info.add_metric([session_id, shown.opened.optimizer], 1)
            if last := shown.step:
                step.add_metric([session_id], last.step)
                time.add_metric([session_id], last.time_s)
                norm.add_metric([session_id], last.gradient_norm)
                for group, lr in islice(last.rates.items(), GROUP_SERIES_MAX):
                    rate.add_metric([session_id, group], lr)
            for evaluated in tuple(shown.losses.values()):
                loss.add_metric([session_id, evaluated.split], evaluated.loss)
                if evaluated.accuracy is not None:
                    accuracy.add_metric([session_id, evaluated.split], evaluated.accuracy)
        return [info, step, time, norm, rate, loss, accuracy]

    describe = collect  # The registry asks for the names.


def _family(name: str, documentation: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"optserve_session_{name}", documentation, labels=["session", *labels])


class _WithoutCreated(Collector):
    """Shows what ``source`` holds, less the ``_created`` series.

    They would add one series for each counter and histogram. The library can only switch them off
    for the whole process, which may hold the metrics of others.
    """

    def __init__(self, source: CollectorRegistry) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, less what tells when it was created."""
        for metric in self._source.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric

    describe = collect  # The registry asks for the names.
