# The server in an image: the contract and the server, no client; nothing that runs in it needs a shell.
#
#   docker build -t optserve .
#   docker run --rm --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#       -e OPTSERVE_ALLOW_PLAINTEXT=true -p 127.0.0.1:50051:50051 -p 127.0.0.1:9464:9464 optserve
#
# Without TLS (OPTSERVE_TLS_CERTIFICATE, OPTSERVE_TLS_KEY) it serves only where it is told that it may; see
# server/docs/operations.md, which also has the health check for TLS.
#
# For CUDA, torch comes from another index:
#   docker build -t optserve:cuda --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cu130 .
#   docker run --rm --gpus all ... optserve:cuda
#
# For --archive-url, the library of the object store is named; without one there is file:// alone:
#   docker build -t optserve --build-arg STORE_LIBRARY=s3fs .
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PYTHON=/opt/optserve/bin/python
WORKDIR /src
RUN ["python", "-m", "venv", "--without-pip", "/opt/optserve"]

# What changes least comes first. From torch's own index comes torch and nothing else.
COPY requirements-server.txt .
RUN grep '^torch==' requirements-server.txt > requirements-torch.txt \
    && pip install --no-deps --index-url "${TORCH_INDEX_URL}" -r requirements-torch.txt \
    && pip install -r requirements-server.txt

# Constrained: a library of another fsspec than the server's would not find its place in it.
ARG STORE_LIBRARY=
RUN [ -z "${STORE_LIBRARY}" ] || pip install --constraint requirements-server.txt "${STORE_LIBRARY}"

COPY protos protos
COPY server server
RUN pip install --no-deps ./protos ./server && pip check

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/optserve /opt/optserve
# HOME is on the only thing that may be written to: some libraries insist on a cache.
ENV PATH=/opt/optserve/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# For --data-dir: a volume that is mounted here belongs to the server's user.
RUN ["install", "-d", "-o", "65532", "-g", "65532", "-m", "0700", "/var/lib/optserve"]
USER 65532:65532
WORKDIR /tmp

# gRPC
EXPOSE 50051
# Prometheus: /metrics
EXPOSE 9464

STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-m", "optserve_server.rpc.probe", "127.0.0.1:50051"]
ENTRYPOINT ["python", "-m", "optserve_server"]
CMD ["--host", "0.0.0.0", "--port", "50051", "--metrics-host", "0.0.0.0", "--metrics-port", "9464", "--log-format", "json"]
