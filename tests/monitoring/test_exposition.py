from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

import pytest
from monitoring.scraping import ROOT, scrape, until
from monitoring.training import (
    CLASSES,
    GRADIENT,
    LOGITS,
    STEPS,
    STREAM_STEPS,
    UNARY_STEPS,
    connected,
    train,
)
from prometheus_client.parser import text_string_to_metric_families
from server_process import ServerProcess

from optserve_server import __version__

# name -> type and labels, as the table in the documentation and the exposition both tell it.
Metrics = dict[str, tuple[str, frozenset[str]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrapes:
    """What scrapes got before and after a session did all that a session does."""

    before: str
    after: str

    def increase(self, series: str) -> float:
        """Return by how much a series, as the exposition writes it, grew."""
        return value(self.after, series) - value(self.before, series)


@pytest.fixture(scope="module")
def scrapes(server: ServerProcess) -> Scrapes:
    before = scrape(server.metrics_address)
    with connected(server.address) as stub:
        train(stub)
    # A call is counted as handled a moment after its client has its answer; this is the last.
    handled = call("handled_total", "Step", ',grpc_type="unary"', 'grpc_code="InvalidArgument",')
    refused = value(before, handled)
    until(
        lambda: value(scrape(server.metrics_address), handled) > refused,
        10,
        "the end of the last call",
    )
    return Scrapes(before=before, after=scrape(server.metrics_address))


@pytest.fixture(scope="module")
def exposition(scrapes: Scrapes) -> str:
    return scrapes.after


def value(exposition: str, series: str) -> float:
    [line] = [line for line in exposition.splitlines() if line.startswith(series + " ")]
    return float(line.removeprefix(series))


def call(counter: str, method: str, kind: str, code: str = "") -> str:
    """Return the series of a method of the service."""
    service = "optserve.v1.OptimizerService"
    labels = f'{code}grpc_method="{method}",grpc_service="{service}"{kind}'
    return f"grpc_server_{counter}{{{labels}}}"


def exposed(exposition: str) -> Metrics:
    metrics: Metrics = {}
    for family in text_string_to_metric_families(exposition):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = frozenset(label for sample in family.samples for label in sample.labels) - {"le"}
        metrics[name] = (family.type, labels)
    return metrics


def documented() -> Metrics:
    """Read the table of metrics in the documentation, less what is not there on a CPU."""
    text = (ROOT / "server" / "docs" / "operations.md").read_text()
    metrics: Metrics = {}
    for line in text.partition("### Metrics")[2].partition("### Alerts")[0].splitlines():
        row = re.fullmatch(r"\| `(\w+)` \| (\w+) \|(.*)\| (.*) \|", line)
        if row and "CUDA only" not in row[4]:
            metrics[row[1]] = (row[2], frozenset(re.findall(r"`(\w+)`", row[3])))
    return metrics


def test_the_documentation_has_every_metric_and_no_other(exposition: str) -> None:
    assert documented() == exposed(exposition)


def test_promtool_has_no_complaint(promtool: str, exposition: str) -> None:
    run = subprocess.run(
        [promtool, "check", "metrics"],
        input=exposition,
        text=True,
        capture_output=True,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_promtool_would_complain(promtool: str) -> None:
    run = subprocess.run(
        [promtool, "check", "metrics"],
        input="# TYPE steps counter\nsteps 1\n",
        text=True,
        capture_output=True,
        check=False,
    )
    assert run.returncode != 0
    assert "no help text" in run.stdout + run.stderr


def test_what_is_running_is_told(exposition: str) -> None:
    assert f'version="{__version__}"' in exposition


def test_every_call_and_message_is_counted_once(scrapes: Scrapes) -> None:
    unary, stream = ',grpc_type="unary"', ',grpc_type="bidi_stream"'
    assert scrapes.increase(call("started_total", "Step", unary)) == UNARY_STEPS + 1
    assert scrapes.increase(call("handled_total", "Step", unary, 'grpc_code="OK",')) == UNARY_STEPS
    assert scrapes.increase(call("handling_seconds_count", "Step", unary)) == UNARY_STEPS + 1

    assert scrapes.increase(call("started_total", "Train", stream)) == 1
    assert scrapes.increase(call("handled_total", "Train", stream, 'grpc_code="OK",')) == 1
    # Opening and answering it, then begin, chunks, end and result, chunks, end.
    for counter in ("msg_received_total", "msg_sent_total"):
        assert scrapes.increase(call(counter, "Train", stream)) == 1 + 3 * STREAM_STEPS


def test_every_byte_of_a_tensor_is_counted_once(scrapes: Scrapes) -> None:
    moved = 'optserve_tensor_bytes_total{{direction="{}"}}'
    parameters = len(GRADIENT)
    evaluation = len(LOGITS.data) + len(CLASSES.data)
    loss_gradient = len(LOGITS.data)  # With the training loss only.
    received = parameters + STEPS * parameters + 2 * evaluation
    assert scrapes.increase(moved.format("received")) == received
    assert scrapes.increase(moved.format("sent")) == STEPS * parameters + loss_gradient


def test_reserved_memory_holds_parameters_state_and_gradients(scrapes: Scrapes) -> None:
    # Adam keeps two numbers for each of the parameter's.
    assert scrapes.increase("optserve_reserved_bytes") >= 4 * len(GRADIENT)
    assert scrapes.increase('optserve_sessions{optimizer="Adam"}') == 1
