"""A real Prometheus scrapes a real server that trains, and is asked what it saw."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from monitoring.prometheus import SCRAPE_TIMEOUT_S, Prometheus, scraping
from monitoring.promql import metric_names
from monitoring.scraping import DEPLOY, ROOT, until
from monitoring.training import STEPS, connected, delete, train
from server_process import ServerProcess


@pytest.fixture(scope="module")
def prometheus(
    prometheus_program: str, server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    with scraping(prometheus_program, folder, server.metrics_address) as prometheus:
        # A rate needs to have seen the counters before they move.
        until(lambda: prometheus.value("up") == 1, SCRAPE_TIMEOUT_S, "a first scrape")
        yield prometheus


@pytest.fixture(scope="module")
def session_id(prometheus: Prometheus, server: ServerProcess) -> str:
    """Train, and wait until Prometheus has seen all of it."""
    with connected(server.address) as stub:
        session_id = train(stub)
    session = f'{{session="{session_id}"}}'
    until(
        lambda: (
            prometheus.value(f"optserve_session_step{session}") == STEPS
            and len(prometheus.query(f"optserve_session_loss{session}")) == 2
        ),
        SCRAPE_TIMEOUT_S,
        "the session's steps and losses in Prometheus",
    )
    return session_id


def test_the_server_is_up(prometheus: Prometheus, server: ServerProcess) -> None:
    assert prometheus.query('up{job="optserve"}') == [
        (
            {"__name__": "up", "instance": server.metrics_address, "job": "optserve"},
            1.0,
        )
    ]


@pytest.mark.usefixtures("session_id")
def test_steps_are_counted_by_optimizer(prometheus: Prometheus) -> None:
    increase = prometheus.value('max_over_time(optserve_steps_total{optimizer="Adam"}[5m])')
    begin = prometheus.value('min_over_time(optserve_steps_total{optimizer="Adam"}[5m])')
    assert increase is not None
    assert begin is not None
    assert increase - begin == STEPS
    assert prometheus.value('optserve_steps_total{optimizer="SGD"}') == 0


@pytest.mark.usefixtures("session_id")
@pytest.mark.parametrize("phase", ["receive", "queue", "apply", "send"])
def test_each_phase_of_each_step_is_measured(prometheus: Prometheus, phase: str) -> None:
    name = "optserve_step_phase_duration_seconds"
    counts = f'{name}_count{{phase="{phase}"}}'
    steps = prometheus.value('optserve_steps_total{optimizer="Adam"}')
    assert prometheus.value(counts) == steps
    p99 = prometheus.value(f'histogram_quantile(0.99, {name}_bucket{{phase="{phase}"}})')
    assert p99 is not None
    assert 0 < p99 <= 10


def test_a_session_shows_where_it_stands(prometheus: Prometheus, session_id: str) -> None:
    def of_session(metric: str, labels: str = "") -> float | None:
        return prometheus.value(f'optserve_session_{metric}{{session="{session_id}"{labels}}}')

    assert of_session("info", ', optimizer="Adam"') == 1
    assert of_session("step") == STEPS
    assert of_session("learning_rate", ', group="default"') == 0.125
    # The gradient is 1, -1, 2, -2, 3, -3: the root of 28.
    assert of_session("gradient_norm") == pytest.approx(28**0.5)
    for split in ("train", "validation"):
        # Logits 5, 0, 0 of the right class cost log(1 + 2/e^5); of a wrong one, 5 more.
        assert of_session("loss", f', split="{split}"') == pytest.approx(2.5133858, abs=1e-5)
        assert of_session("accuracy_ratio", f', split="{split}"') == 0.5
    age = prometheus.value(
        f'time() - optserve_session_last_step_timestamp_seconds{{session="{session_id}"}}'
    )
    assert age is not None
    assert -1 < age < 120


def test_a_refusal_and_its_call_are_counted(prometheus: Prometheus, session_id: str) -> None:
    assert session_id
    refused = 'optserve_refusals_total{reason="SHAPE_MISMATCH"}'
    until(lambda: (prometheus.value(refused) or 0) >= 1, SCRAPE_TIMEOUT_S, "the refusal")
    handled = 'grpc_server_handled_total{grpc_method="Step", grpc_code="InvalidArgument"}'
    assert (prometheus.value(handled) or 0) >= 1
    assert prometheus.value('optserve_refusals_total{reason="INTERNAL"}') == 0


def test_a_deleted_session_is_gone_from_every_gauge(
    prometheus: Prometheus, server: ServerProcess
) -> None:
    with connected(server.address) as stub:
        session_id = train(stub)
        query = f'{{session="{session_id}"}}'
        until(
            lambda: len(prometheus.query(query)) >= 9,
            SCRAPE_TIMEOUT_S,
            "the session's gauges: 5, and 2 on each split",
        )
        delete(stub, session_id)
    until(lambda: prometheus.query(query) == [], SCRAPE_TIMEOUT_S, "the end of its gauges")


def test_the_alerts_are_healthy_silent_and_ask_for_metrics_that_exist(
    prometheus: Prometheus, session_id: str
) -> None:
    assert session_id
    known = set(prometheus.ask("label/__name__/values"))

    def rules() -> list[dict[str, Any]]:
        [group] = prometheus.ask("rules")["groups"]
        found = group["rules"]
        assert isinstance(found, list)
        return found

    until(
        lambda: all(rule["health"] == "ok" for rule in rules()),
        SCRAPE_TIMEOUT_S,
        "an evaluation of every rule",
    )
    for rule in rules():
        assert metric_names(rule["query"]) <= known, rule["name"]
        assert rule["state"] == "inactive", rule["name"]


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Yield title and query of every panel of every dashboard."""
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", []):
                yield panel["title"], target["expr"]


@pytest.mark.parametrize(
    ("title", "query"),
    [pytest.param(title, query, id=title) for title, query in dashboard_queries()],
)
def test_every_panel_of_the_dashboard_shows_something(
    prometheus: Prometheus, session_id: str, title: str, query: str
) -> None:
    assert session_id
    assert metric_names(query) <= set(prometheus.ask("label/__name__/values")), title
    for variable, value in (("$__rate_interval", "5m"), ("$instance", ".*"), ("$session", ".*")):
        query = query.replace(variable, value)
    assert "$" not in query.replace('"$1"', "")
    until(lambda: prometheus.query(query) != [], SCRAPE_TIMEOUT_S, title)


def documented_queries() -> list[str]:
    """Return every query of the documentation: one a line."""
    text = (ROOT / "server" / "docs" / "operations.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```promql\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("query", documented_queries())
def test_every_query_of_the_documentation_shows_something(
    prometheus: Prometheus, session_id: str, query: str
) -> None:
    assert session_id
    assert metric_names(query) <= set(prometheus.ask("label/__name__/values"))
    until(lambda: prometheus.query(query) != [], SCRAPE_TIMEOUT_S, query)


def test_the_variables_of_the_dashboard_ask_for_metrics_that_exist(
    prometheus: Prometheus, session_id: str
) -> None:
    assert session_id
    text = (DEPLOY / "grafana" / "dashboards" / "optserve.json").read_text()
    asked = {
        match[1]
        for variable in json.loads(text)["templating"]["list"]
        if (match := re.match(r"label_values\((\w+)", variable["query"]["query"]))
    }
    assert asked == {"optserve_build_info", "optserve_session_info"}
    assert asked <= set(prometheus.ask("label/__name__/values"))
