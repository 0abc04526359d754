from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from monitoring.conftest import image_command
from monitoring.scraping import DEPLOY, ROOT
from pydantic import ValidationError

from optserve_server import config

PROMETHEUS = DEPLOY / "prometheus"


def run(*command: str, folder: Path = PROMETHEUS) -> str:
    """Return what a command says; fail if it fails."""
    result = subprocess.run(
        command,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def alerts(text: str) -> set[str]:
    return set(re.findall(r"alert: (\w+)", text))


def test_promtool_accepts_the_rules_and_the_configuration(promtool: str) -> None:
    run(promtool, "check", "rules", "--lint-fatal", "alerts.yml")
    run(promtool, "check", "config", "prometheus.yml")


def test_the_alerts_fire_when_they_should_and_only_then(promtool: str) -> None:
    assert "SUCCESS" in run(promtool, "test", "rules", "alerts_test.yml")


def test_the_tests_of_the_alerts_can_fail(promtool: str, tmp_path: Path) -> None:
    rules = (PROMETHEUS / "alerts.yml").read_text()
    (tmp_path / "alerts.yml").write_text(rules.replace("for: 1m", "for: 30m"))
    (tmp_path / "alerts_test.yml").write_text((PROMETHEUS / "alerts_test.yml").read_text())
    with pytest.raises(AssertionError, match="FAILED"):
        run(promtool, "test", "rules", "alerts_test.yml", folder=tmp_path)


def test_every_alert_is_tested_and_explained() -> None:
    defined = alerts((PROMETHEUS / "alerts.yml").read_text())
    assert defined
    assert all(re.fullmatch(r"(?:[A-Z][a-z]+)+", name) for name in defined)
    tested = set(re.findall(r"alertname: (\w+)", (PROMETHEUS / "alerts_test.yml").read_text()))
    assert tested == defined
    documentation = (ROOT / "server" / "docs" / "operations.md").read_text()
    table = documentation.partition("### Alerts")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == defined


def test_ports_are_the_same_wherever_they_stand() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    command = json.loads(dockerfile.split("\nCMD ")[1].splitlines()[0])
    flags = dict(zip(command[::2], command[1::2], strict=True))
    grpc_port, metrics_port = flags["--port"], flags["--metrics-port"]

    assert re.findall(r"^EXPOSE (\d+)$", dockerfile, re.MULTILINE) == [grpc_port, metrics_port]
    assert f'"127.0.0.1:{grpc_port}"]' in dockerfile.partition("HEALTHCHECK")[2]
    assert f'"server:{metrics_port}"' in (PROMETHEUS / "prometheus.yml").read_text()
    assert f':{grpc_port}:{grpc_port}"' in (DEPLOY / "compose.yml").read_text()


def test_the_image_is_built_from_the_contract_and_the_server_alone() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {line for line in ignored if line.startswith("!")} == {
        "!requirements-server.txt",
        "!protos",
        "!server",
    }
    copied = re.findall(r"^COPY (?!--from)(\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert copied == ["requirements-server.txt", "protos", "server"]
    assert all((ROOT / source).exists() for source in copied)


def test_the_image_serves_strangers_only_when_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _python, _module, _name, *flags = image_command()
    with pytest.raises(ValidationError, match="there is no TLS"):
        config.load(flags, {})
    monkeypatch.setenv("OPTSERVE_ALLOW_PLAINTEXT", "true")
    assert not config.load(flags, {}).is_private
    assert 'OPTSERVE_ALLOW_PLAINTEXT: "true"' in (DEPLOY / "compose.yml").read_text()


def test_containers_run_without_root_and_rights() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    # By its number: who checks that it is not root cannot look a name up.
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", dockerfile, re.MULTILINE)
    compose = (DEPLOY / "compose.yml").read_text().partition("\nvolumes:")[0]
    for service in re.split(r"\n  (?=\w+:\n)", compose)[1:]:
        assert "cap_drop: [ALL]" in service
        assert "no-new-privileges:true" in service
        assert not re.search(r'- "(?!127\.0\.0\.1:)[\d.]*:?\d+:\d+"', service)
        assert "read_only: true" in service or service.startswith("grafana")


def test_compose_mounts_only_what_is_there() -> None:
    mounts = re.findall(r"^ +- (\./\S+?):/", (DEPLOY / "compose.yml").read_text(), re.MULTILINE)
    assert len(mounts) == 3
    assert all((DEPLOY / mount).is_dir() for mount in mounts)
