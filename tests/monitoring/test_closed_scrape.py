"""Metrics that strangers are not shown: HTTPS, certificates of scrapers, and what they are for."""

from __future__ import annotations

import re
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from certificates import Authority, Identity, ServerFiles
from monitoring.prometheus import SCRAPE_TIMEOUT_S, scraping
from monitoring.scraping import ROOT, until
from server_process import ServerProcess, running_server

TIMEOUT_S = 10.0


def documented_jobs() -> str:
    """Return what the documentation has Prometheus configured with."""
    text = (ROOT / "server" / "docs" / "operations.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert isinstance(block, str)
    return block


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """A server whose metrics are for those who show a certificate."""

    server: ServerProcess
    files: ServerFiles
    servers: Authority
    scrapers: Authority
    """Another one: who may train may not see what others do."""
    folder: Path

    def context(self, identity: Identity | None, root: bytes | None = None) -> ssl.SSLContext:
        """Return what a scraper connects with, who shows what it has."""
        context = ssl.create_default_context(cadata=(root or self.servers.root).decode())
        if identity:
            paths = self.folder / "shown.pem", self.folder / "shown.key"
            _write(identity, *paths)
            context.load_cert_chain(*paths)
        return context

    def get(self, context: ssl.SSLContext) -> str:
        """Scrape once."""
        url = f"https://{self.server.metrics_address}/metrics"
        with urllib.request.urlopen(url, timeout=TIMEOUT_S, context=context) as answer:
            text: bytes = answer.read()
        return text.decode()


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    folder = tmp_path_factory.mktemp("closed")
    servers, scrapers = Authority(), Authority()
    files = ServerFiles.of(folder, servers.server())
    (folder / "scrapers.pem").write_bytes(scrapers.root)
    (folder / "clients.pem").write_bytes(servers.root)
    flags = [*files.flags, "--tls-client-ca", str(folder / "clients.pem")]
    flags += ["--metrics-tls", "true", "--metrics-client-ca", str(folder / "scrapers.pem")]
    with running_server(*flags) as server:
        yield Closed(server=server, files=files, servers=servers, scrapers=scrapers, folder=folder)


def _write(identity: Identity, certificate: Path, key: Path) -> None:
    certificate.write_bytes(identity.certificate)
    key.write_bytes(identity.key)


@pytest.mark.parametrize(("whose", "sees"), [("scrapers", True), ("servers", False)])
def test_a_prometheus_scrapes_over_https_if_its_certificate_is_one_for_that(
    whose: str, sees: bool, closed: Closed, prometheus_program: str, tmp_path: Path
) -> None:
    authority: Authority = getattr(closed, whose)
    _write(
        authority.client(common_name="prometheus"),
        tmp_path / "prometheus.pem",
        tmp_path / "prometheus.key",
    )
    (tmp_path / "root.pem").write_bytes(closed.servers.root)
    target = closed.server.metrics_address
    with scraping(prometheus_program, tmp_path, target, documented_jobs()) as prometheus:
        until(lambda: prometheus.value("up") == sees, SCRAPE_TIMEOUT_S, "a scrape")
        assert len(prometheus.query("optserve_build_info")) == sees


@pytest.mark.parametrize("who", ["nobody", "tenant", "foreign"])
def test_who_has_no_certificate_for_it_is_shown_nothing(closed: Closed, who: str) -> None:
    identity = {
        "nobody": None,
        "tenant": closed.servers.client(common_name="alice"),
        "foreign": Authority().client(common_name="prometheus"),
    }[who]
    with pytest.raises((OSError, urllib.error.URLError)):
        closed.get(closed.context(identity))
    assert "optserve_sessions" in closed.get(closed.context(closed.scrapers.client("prometheus")))


def test_nothing_is_said_in_clear(closed: Closed) -> None:
    host, port = closed.server.metrics_address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while data := _read(connection):
            answer += data
    assert b"optserve" not in answer


def _read(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 16)
    except ConnectionError:
        return b""


def test_who_does_not_shake_hands_keeps_nobody_waiting(closed: Closed) -> None:
    host, port = closed.server.metrics_address.rsplit(":", 1)
    scraper = closed.context(closed.scrapers.client("prometheus"))
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S):
        assert "optserve_sessions" in closed.get(scraper)


def test_its_certificate_changes_with_the_server_s(closed: Closed) -> None:
    scraper, other = closed.scrapers.client("prometheus"), Authority()
    before = closed.files.certificate.read_bytes(), closed.files.key.read_bytes()
    closed.files.write(other.server())

    def renewed() -> bool:
        try:
            closed.get(closed.context(scraper, other.root))
        except ssl.SSLError:
            return False
        except urllib.error.URLError as error:
            return not isinstance(error.reason, ssl.SSLError)
        return True

    until(renewed, TIMEOUT_S, "the new certificate")
    closed.files.write(Identity(certificate=before[0], key=before[1]))
    until(lambda: not renewed(), TIMEOUT_S, "the old certificate again")
