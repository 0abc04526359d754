"""The HTTP endpoint that Prometheus scrapes: its own port, its own threads, no event loop.

With TLS it is HTTPS, for everybody or for those who show a certificate.
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from socketserver import BaseRequestHandler
from threading import Thread
from typing import TypeAlias
from wsgiref.simple_server import WSGIRequestHandler, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

__all__ = ["MetricsEndpoint"]

METRICS_PATH = "/metrics"

READ_TIMEOUT_S = 5.0  # A scraper sends its request at once; whoever is silent for longer is none.
CONNECTIONS_MAX = 16  # Each is a thread. A few scrapers and a person with a browser.
_STOP_POLL_S = 0.1  # Every end waits for it; socketserver has half a second.

_log = logging.getLogger(__name__)


class MetricsEndpoint:
    """Serves a registry at ``/metrics``, from the moment it is made until ``stop``.

    Args:
        registry: What is served; it is collected in a thread for each request.
        host: Address or name to listen on.
        port: Port to listen on; 0 lets the system choose one, which ``address`` tells.
        tls: Asked with each connection for what to encrypt it with. None: it is not encrypted.

    Raises:
        OSError: It cannot listen there.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        host: str,
        port: int,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self._server = make_server(
            host,
            port,
            _only_metrics(make_wsgi_app(registry)),
            server_class=_Server6 if ":" in host else _Server,
            handler_class=_Handler,
        )
        self._server.tls = tls
        serve = partial(self._server.serve_forever, poll_interval=_STOP_POLL_S)
        self._thread = Thread(target=serve, name="metrics", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Where it listens, with the real port: ``127.0.0.1:9464``, ``[::1]:9464``."""
        host, port = self._server.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    def stop(self) -> None:
        """Stop listening, break off what is still being asked, and join every thread."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _only_metrics(metrics: WSGIApplication) -> WSGIApplication:
    """Return an application: ``metrics`` at its path, and elsewhere where to find it."""

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        status, hint = HTTPStatus.NOT_FOUND, f"optserve: metrics are at {METRICS_PATH}\n"
        if environ["PATH_INFO"] == METRICS_PATH:
            try:
                return metrics(environ, start_response)
            except Exception:  # noqa: BLE001 - Whatever a collector raises: it is logged here.
                _log.exception("metrics could not be collected")
                status, hint = HTTPStatus.INTERNAL_SERVER_ERROR, "optserve: see the log\n"
        elif environ["PATH_INFO"] == "/":
            status = HTTPStatus.OK
        headers = [("Content-Type", "text/plain; charset=utf-8")]
        start_response(f"{status.value} {status.phrase}", headers)
        return [hint.encode()]

    return application


_Connection: TypeAlias = socket.socket | tuple[bytes, socket.socket]  # The latter is UDP's.


class _Server(ThreadingWSGIServer):
    """The library's server, with a bound on its connections, all of which end when it closes."""

    daemon_threads = False  # server_close() joins them.
    tls: Callable[[], ssl.SSLContext] | None = None

    def __init__(self, address: tuple[str, int], handler: type[BaseRequestHandler]) -> None:
        self._connections: set[socket.socket] = set()
        super().__init__(address, handler)

    def get_request(self) -> tuple[socket.socket, object]:
        connection, client_address = super().get_request()
        if self.tls:
            # Shakes hands when it is first read from: in its own thread, and within its timeout.
            connection = self.tls().wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        self._connections.add(connection)
        return connection, client_address

    def verify_request(self, request: _Connection, client_address: object) -> bool:  # noqa: ARG002
        return len(self._connections) <= CONNECTIONS_MAX

    def shutdown_request(self, request: _Connection) -> None:
        self._connections.difference_update({request})
        super().shutdown_request(request)

    def handle_error(self, request: _Connection, client_address: object) -> None:  # noqa: ARG002
        _log.debug("a connection broke off", exc_info=True)

    def server_close(self) -> None:
        # Or a client that sends a byte now and then would keep its thread, and us, for ever.
        for connection in tuple(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = READ_TIMEOUT_S

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing: a scrape every few seconds is no news."""
