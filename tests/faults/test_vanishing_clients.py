"""Clients that vanish are nothing that an operator must read about."""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Sequence

import torch
from drivers_grpc import StubDriver
from faults.http2 import framed
from faults.test_slow_loris import call_begun
from google.protobuf.message import Message
from messages import chunks_of, headers_of
from relay import relay
from scenarios.models import spec
from server_process import running_server

from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_pb2 import SGD

VALUES = {"w": torch.zeros(100_000)}
LARGE = {"w": torch.zeros(4_000_000)}  # 16 MB: under way for a while.
TIMES = 60


def _reset(connected: socket.socket) -> None:
    """Break a connection off as a machine does that has lost its power and comes back."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connected.close()


def test_calls_whose_clients_vanish_leave_no_traceback_in_the_log() -> None:
    choices = random.Random(7)
    with running_server() as server, StubDriver(server.address) as driver:
        session_id = driver.create(spec(SGD(lr=1), parameters=VALUES)).status.session_id
        driver.upload(session_id, VALUES)
        opening = pb.TrainRequest(open=pb.TrainOpen(session_id=session_id))
        begin = pb.TrainRequest(begin=pb.StepBegin(step=7, gradients=headers_of(VALUES)))
        chunks = [pb.TrainRequest(chunks=each) for each in chunks_of(VALUES.values())]
        upload = pb.UploadBegin(session_id=session_id, parameters=headers_of(VALUES))
        wrong = pb.GetSessionRequest(session_id="0" * 32)
        calls: list[tuple[str, Sequence[Message]]] = [
            ("Train", [opening, begin, *chunks]),
            ("Train", [begin]),
            ("UploadParameters", [pb.UploadParametersRequest(begin=upload)]),
            ("DownloadParameters", [pb.DownloadParametersRequest(session_id=session_id)]),
            ("GetSession", [wrong]),
            ("GetCatalogue", [pb.GetCatalogueRequest()]),
        ]
        host, _, port = server.address.rpartition(":")
        for number in range(TIMES * len(calls)):
            method, messages = calls[number % len(calls)]
            body = b"".join(framed(each.SerializeToString()) for each in messages)
            connected = socket.create_connection((host, int(port)))
            h2_connection = call_begun(method, body[:60_000], end=choices.random() < 0.5)
            connected.sendall(h2_connection.data_to_send())
            time.sleep(choices.choice([0, 0.0005, 0.001, 0.002, 0.005]))
            _reset(connected)
        time.sleep(1)
        driver.get(session_id)
        log = server.log.read_text()
    assert "Traceback" not in log, log
    assert "ERROR" not in log, log


def test_answers_whose_clients_vanish_leave_no_traceback_in_the_log() -> None:
    choices = random.Random(3)
    with running_server("--stall-timeout-s", "0.3") as server, StubDriver(server.address) as driver:
        session_id = driver.create(spec(SGD(lr=1), parameters=LARGE)).status.session_id
        driver.upload(session_id, LARGE)
        request = pb.DownloadParametersRequest(session_id=session_id)
        for number in range(30):
            with relay(server.address) as wire, StubDriver(wire.address) as client:
                download = client.stub.DownloadParameters(request)
                next(download)
                # In the middle of it, or when the server is about to end it for its client's sake.
                time.sleep(choices.uniform(0, 0.02) if number % 2 else choices.uniform(0.25, 0.35))
                wire.cut()
        time.sleep(1)
        driver.get(session_id)
        log = server.log.read_text()
    assert "Traceback" not in log, log
    assert "ERROR" not in log, log
