from __future__ import annotations

from collections.abc import Iterable

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.exposition import choose_encoder
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import DuplicateTimeseries

from optserve_server.core.events import (
    Direction,
    LossEvaluated,
    Observer,
    Phase,
    RpcKind,
    RpcMethod,
    SessionOpened,
    StepApplied,
)
from optserve_server.telemetry.metrics import GROUP_SERIES_MAX, RPC_CODES, Build, Metrics

TRAIN = RpcMethod(kind=RpcKind.BIDI_STREAM, service="optserve.v1.OptimizerService", method="Train")
BUILD = Build(version="1.2.3", torch="2.13.0+cpu", device="cpu")

# What is counted or measured in nothing has no unit to end with.
UNITLESS = {
    "optserve_steps",
    "optserve_steps_repeated",
    "optserve_loss_evaluations",
    "optserve_refusals",
    "optserve_sessions",
    "optserve_sessions_parked",
    "optserve_snapshot_failures",
    "optserve_archive_failures",
    "optserve_session_metrics_dropped",
    "optserve_session_step",
    "optserve_session_gradient_norm",
    "optserve_session_learning_rate",
    "optserve_session_loss",
    "grpc_server_started",
    "grpc_server_handled",
    "grpc_server_msg_received",
    "grpc_server_msg_sent",
}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Observer:  # The type checker's proof that it is one.
    return build(registry)


def build(registry: CollectorRegistry, sessions_max: int = 2) -> Metrics:
    return Metrics(
        registry,
        build=BUILD,
        methods=[TRAIN],
        reasons=["SHAPE_MISMATCH", "TOO_MANY"],
        optimizers=["SGD", "Adam"],
        sessions_max=sessions_max,
        device_memory_bytes=lambda: 4096.0,
    )


def opened(session_id: str = "a" * 32, optimizer: str = "Adam") -> SessionOpened:
    return SessionOpened(session_id=session_id, tenant="", optimizer=optimizer)


def applied(
    step: int, session_id: str = "a" * 32, rates: dict[str, float] | None = None
) -> StepApplied:
    return StepApplied(
        session_id=session_id,
        optimizer="Adam",
        step=step,
        rates=rates or {"default": 0.5},
        gradient_norm=2.25,
        time_s=1_700_000_000.5,
    )


def evaluated(split: str, loss: float, accuracy: float | None = None) -> LossEvaluated:
    return LossEvaluated(session_id="a" * 32, split=split, loss=loss, accuracy=accuracy)


def series(registry: CollectorRegistry, prefix: str) -> set[str]:
    """Return the lines of the exposition that begin with ``prefix``."""
    lines = generate_latest(registry).decode().splitlines()
    return {line for line in lines if line.startswith(prefix)}


def sessions_shown(registry: CollectorRegistry) -> set[str]:
    return {
        sample.labels["session"]
        for family in registry.collect()
        for sample in family.samples
        if "session" in sample.labels
    }


@pytest.mark.usefixtures("metrics")
def test_known_series_are_there_at_zero_before_anything_happens(
    registry: CollectorRegistry,
) -> None:
    assert series(registry, "optserve_steps_total") == {
        'optserve_steps_total{optimizer="SGD"} 0.0',
        'optserve_steps_total{optimizer="Adam"} 0.0',
    }
    assert series(registry, "optserve_step_phase_duration_seconds_count") == {
        f'optserve_step_phase_duration_seconds_count{{phase="{phase}"}} 0.0'
        for phase in ("receive", "queue", "apply", "send")
    }
    assert series(registry, "optserve_tensor_bytes_total") == {
        'optserve_tensor_bytes_total{direction="received"} 0.0',
        'optserve_tensor_bytes_total{direction="sent"} 0.0',
    }
    assert series(registry, "optserve_loss_evaluations_total") == {
        f'optserve_loss_evaluations_total{{split="{split}"}} 0.0'
        for split in ("train", "validation", "none")
    }
    assert series(registry, "optserve_refusals_total") == {
        'optserve_refusals_total{reason="SHAPE_MISMATCH"} 0.0',
        'optserve_refusals_total{reason="TOO_MANY"} 0.0',
    }
    assert series(registry, "optserve_sessions{") == {
        'optserve_sessions{optimizer="SGD"} 0.0',
        'optserve_sessions{optimizer="Adam"} 0.0',
    }
    assert len(series(registry, "grpc_server_handled_total{")) == len(RPC_CODES) == 17
    assert series(registry, "optserve_reserved_bytes") == {"optserve_reserved_bytes 0.0"}


@pytest.mark.usefixtures("metrics")
def test_build_info_says_what_is_running(registry: CollectorRegistry) -> None:
    assert series(registry, "optserve_build_info") == {
        'optserve_build_info{device="cpu",torch="2.13.0+cpu",version="1.2.3"} 1.0'
    }


def test_device_memory_is_asked_for_at_each_scrape() -> None:
    registry, allocated = CollectorRegistry(), [1.0]
    Metrics(
        registry,
        build=BUILD,
        methods=[],
        reasons=[],
        optimizers=[],
        sessions_max=0,
        device_memory_bytes=lambda: allocated[0],
    )
    name = "optserve_device_memory_allocated_bytes"
    assert series(registry, name) == {f"{name} 1.0"}
    allocated[0] = 2.0
    assert series(registry, name) == {f"{name} 2.0"}


def test_device_memory_is_no_metric_where_nobody_knows_it() -> None:
    registry = CollectorRegistry()
    Metrics(registry, build=BUILD, methods=[], reasons=[], optimizers=[], sessions_max=0)
    assert not series(registry, "optserve_device_memory_allocated_bytes")


def test_events_move_their_counters(registry: CollectorRegistry, metrics: Observer) -> None:
    metrics.step_applied(applied(1))
    metrics.step_applied(applied(2))
    metrics.step_repeated("Adam")
    metrics.bytes_moved(Direction.SENT, 340)
    metrics.refused("TOO_MANY")
    metrics.loss_evaluated(evaluated("none", 1.0))

    value = registry.get_sample_value
    assert value("optserve_steps_total", {"optimizer": "Adam"}) == 2
    assert value("optserve_steps_repeated_total", {"optimizer": "Adam"}) == 1
    assert value("optserve_tensor_bytes_total", {"direction": "sent"}) == 340
    assert value("optserve_tensor_bytes_total", {"direction": "received"}) == 0
    assert value("optserve_refusals_total", {"reason": "TOO_MANY"}) == 1
    assert value("optserve_loss_evaluations_total", {"split": "none"}) == 1


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [
        pytest.param(1e-5, "1e-05", id="shortest"),
        pytest.param(0.0003, "0.0005", id="cpu-step"),
        pytest.param(30.0, "30.0", id="longest"),
        pytest.param(31.0, "+Inf", id="longer"),
    ],
)
def test_a_phase_falls_into_the_first_bucket_that_holds_it(
    registry: CollectorRegistry, metrics: Observer, seconds: float, bucket: str
) -> None:
    metrics.phase_ended(Phase.APPLY, seconds)

    name = "optserve_step_phase_duration_seconds"
    buckets = [
        (sample.labels["le"], sample.value)
        for family in registry.collect()
        for sample in family.samples
        if sample.name == f"{name}_bucket" and sample.labels["phase"] == "apply"
    ]
    assert next(le for le, count in buckets if count) == bucket
    assert registry.get_sample_value(f"{name}_sum", {"phase": "apply"}) == seconds
    assert registry.get_sample_value(f"{name}_count", {"phase": "queue"}) == 0


def test_a_call_is_counted_as_go_does(registry: CollectorRegistry, metrics: Observer) -> None:
    metrics.rpc_started(TRAIN)
    metrics.message_received(TRAIN)
    metrics.message_received(TRAIN)
    metrics.message_sent(TRAIN)
    metrics.rpc_handled(TRAIN, "InvalidArgument", 0.2)

    labels = {
        "grpc_type": "bidi_stream",
        "grpc_service": "optserve.v1.OptimizerService",
        "grpc_method": "Train",
    }
    value = registry.get_sample_value
    assert value("grpc_server_started_total", labels) == 1
    assert value("grpc_server_msg_received_total", labels) == 2
    assert value("grpc_server_msg_sent_total", labels) == 1
    assert value("grpc_server_handled_total", labels | {"grpc_code": "InvalidArgument"}) == 1
    assert value("grpc_server_handled_total", labels | {"grpc_code": "OK"}) == 0
    assert value("grpc_server_handling_seconds_count", labels) == 1
    assert value("grpc_server_handling_seconds_sum", labels) == 0.2


def test_a_session_shows_its_last_step_and_losses(
    registry: CollectorRegistry, metrics: Observer
) -> None:
    metrics.session_opened(opened())
    metrics.step_applied(applied(1))
    metrics.step_applied(applied(2, rates={"default": 0.25, "head": 0.125}))
    metrics.loss_evaluated(evaluated("train", 2.0))
    metrics.loss_evaluated(evaluated("train", 1.5, accuracy=0.75))
    metrics.loss_evaluated(evaluated("validation", float("nan")))

    session = "a" * 32
    assert series(registry, "optserve_session_") == {
        "optserve_session_metrics_dropped_total 0.0",
        f'optserve_session_info{{optimizer="Adam",session="{session}"}} 1.0',
        f'optserve_session_step{{session="{session}"}} 2.0',
        f'optserve_session_last_step_timestamp_seconds{{session="{session}"}} 1.7000000005e+09',
        f'optserve_session_gradient_norm{{session="{session}"}} 2.25',
        f'optserve_session_learning_rate{{group="default",session="{session}"}} 0.25',
        f'optserve_session_learning_rate{{group="head",session="{session}"}} 0.125',
        f'optserve_session_loss{{session="{session}",split="train"}} 1.5',
        f'optserve_session_loss{{session="{session}",split="validation"}} NaN',
        f'optserve_session_accuracy_ratio{{session="{session}",split="train"}} 0.75',
    }


def test_a_loss_that_is_not_kept_is_on_no_curve(
    registry: CollectorRegistry, metrics: Observer
) -> None:
    metrics.session_opened(opened())
    metrics.loss_evaluated(evaluated("none", 2.0, accuracy=0.5))
    assert not series(registry, "optserve_session_loss{")
    assert not series(registry, "optserve_session_accuracy_ratio{")


def test_closing_a_session_removes_all_its_series(
    registry: CollectorRegistry, metrics: Observer
) -> None:
    session = opened()
    metrics.session_opened(session)
    metrics.step_applied(applied(1))
    metrics.loss_evaluated(evaluated("train", 2.0, accuracy=0.5))
    assert registry.get_sample_value("optserve_sessions", {"optimizer": "Adam"}) == 1

    metrics.session_closed(session)

    assert sessions_shown(registry) == set()
    assert registry.get_sample_value("optserve_sessions", {"optimizer": "Adam"}) == 0
    assert registry.get_sample_value("optserve_steps_total", {"optimizer": "Adam"}) == 1


def test_reserved_memory_is_shown_as_it_was_last_told(
    registry: CollectorRegistry, metrics: Observer
) -> None:
    metrics.memory_reserved(1000)
    metrics.memory_reserved(250)
    assert registry.get_sample_value("optserve_reserved_bytes") == 250


def test_an_event_after_the_close_brings_no_series_back(
    registry: CollectorRegistry, metrics: Observer
) -> None:
    metrics.session_opened(opened())
    metrics.session_closed(opened())
    metrics.step_applied(applied(1))
    metrics.loss_evaluated(evaluated("train", 2.0))
    assert sessions_shown(registry) == set()


def test_sessions_beyond_the_cap_are_counted_but_not_shown(
    registry: CollectorRegistry, metrics: Observer
) -> None:
    for session_id in ("first", "second", "third"):
        metrics.session_opened(opened(session_id))
        metrics.step_applied(applied(1, session_id))

    assert sessions_shown(registry) == {"first", "second"}
    assert registry.get_sample_value("optserve_session_metrics_dropped_total") == 1
    assert registry.get_sample_value("optserve_sessions", {"optimizer": "Adam"}) == 3
    assert registry.get_sample_value("optserve_steps_total", {"optimizer": "Adam"}) == 3

    metrics.session_closed(opened("third"))
    metrics.session_closed(opened("first"))
    metrics.session_opened(opened("fourth"))
    assert sessions_shown(registry) == {"second", "fourth"}
    assert registry.get_sample_value("optserve_session_metrics_dropped_total") == 1


def test_no_session_is_shown_where_none_may_be() -> None:
    registry = CollectorRegistry()
    build(registry, sessions_max=0).session_opened(opened())
    assert sessions_shown(registry) == set()


def test_the_groups_of_one_session_are_capped(
    registry: CollectorRegistry, metrics: Observer
) -> None:
    metrics.session_opened(opened())
    metrics.step_applied(applied(1, rates={f"g{i}": i / 8 for i in range(GROUP_SERIES_MAX + 5)}))
    rates = series(registry, "optserve_session_learning_rate{")
    assert len(rates) == GROUP_SERIES_MAX
    assert any('group="g0"' in rate for rate in rates)


def test_a_group_of_any_name_keeps_the_exposition_readable(
    registry: CollectorRegistry, metrics: Observer
) -> None:
    name = 'a "b"\\\n# HELP c'
    metrics.session_opened(opened())
    metrics.step_applied(applied(1, rates={name: 0.5}))
    groups = {
        sample.labels["group"]
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
        if "group" in sample.labels
    }
    assert groups == {name}


def test_an_optimizer_from_a_plug_in_gets_its_series_when_it_comes(
    registry: CollectorRegistry, metrics: Observer
) -> None:
    metrics.session_opened(opened(optimizer="Lion"))
    assert registry.get_sample_value("optserve_sessions", {"optimizer": "Lion"}) == 1


@pytest.mark.usefixtures("metrics")
def test_every_metric_has_help_and_ends_with_its_unit(registry: CollectorRegistry) -> None:
    units = ("_seconds", "_bytes", "_ratio", "_info")
    for family in registry.collect():
        name = family.name + ("_info" if family.type == "info" else "")
        assert family.documentation.endswith("."), name
        assert name in UNITLESS or name.endswith(units), name
        assert ":" not in name


def created(lines: Iterable[str]) -> list[str]:
    return [line for line in lines if "_created" in line]


def test_created_series_are_left_out_in_both_formats_and_for_nobody_else(
    registry: CollectorRegistry, metrics: Observer
) -> None:
    metrics.rpc_started(TRAIN)
    assert not created(generate_latest(registry).decode().splitlines())
    openmetrics, _ = choose_encoder("application/openmetrics-text; version=1.0.0")
    assert not created(openmetrics(registry).decode().splitlines())

    stranger = CollectorRegistry()
    Counter("stranger_total", "Somebody else's.", registry=stranger)
    assert created(generate_latest(stranger).decode().splitlines())


@pytest.mark.usefixtures("metrics")
def test_a_second_set_of_metrics_does_not_fit_on_the_same_registry(
    registry: CollectorRegistry,
) -> None:
    with pytest.raises(DuplicateTimeseries):
        build(registry)


def test_a_scrape_can_ask_for_single_metrics(
    registry: CollectorRegistry, metrics: Observer
) -> None:
    metrics.session_opened(opened())
    wanted = {"optserve_session_info", "optserve_reserved_bytes"}
    families = registry.restricted_registry(sorted(wanted)).collect()
    assert {family.name for family in families} == wanted
