"""Ask a server whether it serves: ``python -m optserve_server.rpc.probe 127.0.0.1:50051``.

For images without a shell, whose health check has nothing else to run. Exits with 0 if the server
serves, and otherwise with 1 and the reason on standard error.
"""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

__all__ = ["probe"]

TIMEOUT_S = 3.0  # Health answers in milliseconds; a loaded loop may take some hundred.


def probe(address: str, timeout_s: float = TIMEOUT_S) -> str:
    """Return what ``grpc.health.v1`` says of the whole server: ``SERVING``.

    Raises:
        grpc.RpcError: Nobody answers within ``timeout_s``, or not to this question.
    """
    with grpc.insecure_channel(address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=HealthCheckRequest.SerializeToString,
            response_deserializer=HealthCheckResponse.FromString,
        )
        status = check(HealthCheckRequest(), timeout=timeout_s).status
    return HealthCheckResponse.ServingStatus.Name(status)


def main(arguments: list[str]) -> int | str:
    """Return 0 if the server at the only argument serves, else why not."""
    if len(arguments) != 1:
        return "usage: python -m optserve_server.rpc.probe HOST:PORT"
    try:
        status = probe(arguments[0])
    except grpc.RpcError as error:
        return f"{arguments[0]}: {error.code().name}: {error.details()}"
    return 0 if status == "SERVING" else f"{arguments[0]}: {status}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
