from __future__ import annotations

import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge

from optserve_server.telemetry import endpoint as endpoint_module
from optserve_server.telemetry.endpoint import MetricsEndpoint


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("answers_total", "Answers.", registry=registry).inc(42)
    return registry


@pytest.fixture
def endpoint(registry: CollectorRegistry) -> Iterator[MetricsEndpoint]:
    before = set(threading.enumerate())
    endpoint = MetricsEndpoint(registry, host="127.0.0.1", port=0)
    yield endpoint
    endpoint.stop()
    assert set(threading.enumerate()) == before


def get(endpoint: MetricsEndpoint, path: str) -> tuple[int, str, str]:
    """Status, content type and body of an answer."""
    try:
        with urllib.request.urlopen(f"http://{endpoint.address}{path}", timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


def connect(endpoint: MetricsEndpoint) -> socket.socket:
    host, port = endpoint.address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=10)


def test_port_0_becomes_a_real_port_that_serves_the_registry(endpoint: MetricsEndpoint) -> None:
    host, port = endpoint.address.rsplit(":", 1)
    assert host == "127.0.0.1"
    assert int(port) > 0
    status, content_type, body = get(endpoint, "/metrics")
    assert status == 200
    assert content_type.startswith("text/plain; version=")
    assert "answers_total 42.0" in body.splitlines()


def test_a_scrape_may_name_what_it_wants(endpoint: MetricsEndpoint) -> None:
    status, _, body = get(endpoint, "/metrics?name[]=nothing")
    assert (status, body) == (200, "")


def test_the_root_says_where_the_metrics_are(endpoint: MetricsEndpoint) -> None:
    assert get(endpoint, "/") == (
        200,
        "text/plain; charset=utf-8",
        "optserve: metrics are at /metrics\n",
    )


def test_elsewhere_is_nothing(endpoint: MetricsEndpoint) -> None:
    status, _, body = get(endpoint, "/metrics/private")
    assert status == 404
    assert "answers_total" not in body


def test_two_endpoints_do_not_share_a_port(
    endpoint: MetricsEndpoint, registry: CollectorRegistry
) -> None:
    port = int(endpoint.address.rsplit(":", 1)[1])
    with pytest.raises(OSError, match="in use"):
        MetricsEndpoint(registry, host="127.0.0.1", port=port)


def test_the_port_is_free_again_after_the_stop(registry: CollectorRegistry) -> None:
    first = MetricsEndpoint(registry, host="127.0.0.1", port=0)
    port = int(first.address.rsplit(":", 1)[1])
    assert get(first, "/metrics")[0] == 200
    first.stop()
    with pytest.raises(ConnectionRefusedError):
        connect(first)
    second = MetricsEndpoint(registry, host="127.0.0.1", port=port)
    assert get(second, "/metrics")[0] == 200
    second.stop()


def test_it_listens_on_ipv6_too(registry: CollectorRegistry) -> None:
    if not socket.has_ipv6:
        pytest.skip("this Python has no IPv6")
    try:
        endpoint = MetricsEndpoint(registry, host="::1", port=0)
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    assert endpoint.address.startswith("[::1]:")
    assert get(endpoint, "/metrics")[0] == 200
    endpoint.stop()


def test_silent_clients_hold_up_neither_a_scrape_nor_the_stop(
    registry: CollectorRegistry,
) -> None:
    before = set(threading.enumerate())
    endpoint = MetricsEndpoint(registry, host="127.0.0.1", port=0)
    silent = [connect(endpoint) for _ in range(3)]
    silent[0].sendall(b"GET /metr")
    assert get(endpoint, "/metrics")[0] == 200

    begin = time.monotonic()
    endpoint.stop()
    assert time.monotonic() - begin < endpoint_module.READ_TIMEOUT_S / 2
    assert set(threading.enumerate()) == before
    for connection in silent:
        connection.close()


def test_a_silent_client_is_sent_away(
    endpoint: MetricsEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module._Handler, "timeout", 0.1)
    with connect(endpoint) as silent:
        assert silent.recv(1) == b""


def test_connections_are_bounded(endpoint: MetricsEndpoint) -> None:
    held = [connect(endpoint) for _ in range(endpoint_module.CONNECTIONS_MAX)]
    with connect(endpoint) as one_more:
        assert one_more.recv(1) == b""
    held.pop().close()
    deadline = time.monotonic() + 10
    while True:  # The server notices a closed connection in a moment of its own.
        try:
            assert get(endpoint, "/metrics")[0] == 200
            break
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < deadline
    for connection in held:
        connection.close()


def test_a_collector_that_fails_is_logged_and_told_no_further(
    endpoint: MetricsEndpoint, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> float:
        raise RuntimeError("the device is gone")

    Gauge("broken", "Broken.", registry=registry).set_function(fail)
    with caplog.at_level(logging.ERROR):
        status, _, body = get(endpoint, "/metrics")
    assert (status, body) == (500, "optserve: see the log\n")
    [record] = caplog.records
    assert record.exc_info is not None
    assert "the device is gone" in str(record.exc_info[1])
