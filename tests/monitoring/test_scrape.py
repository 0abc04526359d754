"""A real Prometheus scrapes a real server that trains, and is asked what it saw."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from monitoring.promql import metric_names
from monitoring.scraping import DEPLOY, until
from monitoring.training import STEPS, connected, delete, train
from ports import kept_port
from server_process import ServerProcess

STOP_TIMEOUT_S = 30.0
SCRAPE_TIMEOUT_S = 30.0  # Scrapes come five times a second; a busy machine may keep them waiting.

CONFIGURATION = """
global: {{scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 200ms}}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: optserve
    static_configs: [{{targets: ["{target}"]}}]
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prometheus:
    """A Prometheus process, asked over its HTTP API."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:  # noqa: ANN401 - It is JSON.
        """Return the ``data`` of an answer of the API."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def query(self, query: str) -> list[tuple[dict[str, str], float]]:
        """Return labels and value of each series that ``query`` finds now."""
        result = self.ask("query", query=query)["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def value(self, query: str) -> float | None:
        """Return the value of the only series that ``query`` finds now; None if there is none."""
        found = self.query(query)
        assert len(found) <= 1, found
        return found[0][1] if found else None

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with kept_port() as port:
        yield f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def prometheus(
    prometheus_program: str,
    address: str,
    server: ServerProcess,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "prometheus.yml").write_text(
        CONFIGURATION.format(
            target=server.metrics_address, rules=DEPLOY / "prometheus" / "alerts.yml"
        )
    )
    log = folder / "log"
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            [
                prometheus_program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log_file,
            stderr=log_file,
        )
    prometheus = Prometheus(url=f"http://{address}")
    try:
        until(prometheus.is_ready, SCRAPE_TIMEOUT_S, "Prometheus is ready")
        # A rate needs to have seen the counters before they move.
        until(lambda: prometheus.value("up") == 1, SCRAPE_TIMEOUT_S, "a first scrape")
        yield prometheus
    except AssertionError as error:
        error.add_note(log.read_text())
        raise
    finally:
        process.terminate()
        process.wait(STOP_TIMEOUT_S)


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
