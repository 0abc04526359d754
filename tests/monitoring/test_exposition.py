from __future__ import annotations

import re
import subprocess

import pytest
from monitored_processes import ROOT, Server
from monitored_training import connected, train
from prometheus_client.parser import text_string_to_metric_families

from optserve_server import __version__

# name -> type and labels, as the table in the documentation and the exposition both tell it.
Metrics = dict[str, tuple[str, frozenset[str]]]


@pytest.fixture(scope="module")
def exposition(server: Server) -> str:
    """Return what a scrape gets after a session has done all that a session does."""
    with connected(server.address) as stub:
        train(stub)
    return server.exposition()


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
