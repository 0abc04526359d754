"""Ask a server whether it serves: ``python -m optserve_server.rpc.probe 127.0.0.1:50051``.

For images without a shell, whose health check has nothing else to run. Exits with 0 if the server
serves, and otherwise with 1 and the reason on standard error. Health is told to callers without a
token; a certificate is needed where every client must have one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

__all__ = ["probe"]

TIMEOUT_S = 3.0  # Health answers in milliseconds; a loaded loop may take some hundred.


def probe(channel: grpc.Channel, timeout_s: float = TIMEOUT_S) -> str:
    """Return what ``grpc.health.v1`` says of the whole server: ``SERVING``.

    Raises:
        grpc.RpcError: Nobody answers within ``timeout_s``, or not to this question.
    """
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=HealthCheckRequest.SerializeToString,
        response_deserializer=HealthCheckResponse.FromString,
    )
    status = check(HealthCheckRequest(), timeout=timeout_s).status
    return HealthCheckResponse.ServingStatus.Name(status)


def main(arguments: list[str]) -> int | str:
    """Return 0 if the server that the arguments name serves, else why not."""
    asked = _parser().parse_args(arguments)
    try:
        with _channel(asked) as channel:
            status = probe(channel)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except grpc.RpcError as error:
        return f"{asked.address}: {error.code().name}: {error.details()}"
    return 0 if status == "SERVING" else f"{asked.address}: {status}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m optserve_server.rpc.probe", description="Ask a server whether it serves."
    )
    parser.add_argument("address", help="HOST:PORT, or unix:PATH")
    parser.add_argument("--tls-ca", type=Path, help="PEM file with the server's root: asks by TLS")
    parser.add_argument("--tls-certificate", type=Path, help="PEM file of this client")
    parser.add_argument("--tls-key", type=Path, help="PEM file with its key")
    parser.add_argument("--tls-name", help="what the server's certificate calls it, if not HOST")
    return parser


def _channel(asked: argparse.Namespace) -> grpc.Channel:
    if asked.tls_ca is None:
        return grpc.insecure_channel(asked.address)
    files = (asked.tls_ca, asked.tls_key, asked.tls_certificate)
    root, key, certificate = (path.read_bytes() if path else None for path in files)
    options = [("grpc.ssl_target_name_override", asked.tls_name)] if asked.tls_name else []
    return grpc.secure_channel(
        asked.address, grpc.ssl_channel_credentials(root, key, certificate), options
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
