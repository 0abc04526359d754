"""Shared memory: whoever dies, scribbles or is somewhere else, the session stays what it is."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from drivers import reopened, take
from drivers_grpc import StubDriver, opening
from drivers_shared import SharedDriver, SharedTensors, SharedWorker
from event_loop import TIMEOUT_S
from refusals import RefusedError, refused
from scenarios.models import assert_same, create, gradients, model, spec
from server_process import ServerProcess, running_server

import optserve_client
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_pb2 import SGD, Adam
from optserve_client import ClientConfig, SharedMemoryError, optim
from optserve_server.rpc.shared_memory import is_local

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memfd_create is of Linux"
)

SHM = ClientConfig(lane="shm", retry=optserve_client.Retry.never())

# Another client: it attaches to a session, writes half of a gradient, and says so.
HALF_A_GRADIENT = """
import sys, time
import optserve_client
client = optserve_client.connect(sys.argv[1], config=optserve_client.ClientConfig(lane="shm"))
session = client.join_session(sys.argv[2], download=False)
session.gradient_buffers()["w"][0] = 1e6
print("written", flush=True)
time.sleep(600)
"""

# Another client: it takes a step in the lane that it gets, and says whether that is shared memory.
A_STEP = """
import sys
import numpy as np
import optserve_client
client = optserve_client.connect(sys.argv[1])
session = client.join_session(sys.argv[2])
session.step({"w": np.ones((3, 5), np.float32), "b": np.ones(5, np.float32)})
maps = open("/proc/self/maps").read()
print(session.steps, "memfd:optserve" in maps, float(session.parameters["w"][0, 0]))
"""


def regions_of(process: int) -> int:
    """Count a process's descriptors and mappings of regions."""
    links = []
    for each in Path(f"/proc/{process}/fd").iterdir():
        try:
            links.append(str(each.readlink()))
        except FileNotFoundError:  # Closed meanwhile, or of this very look.
            continue
    maps = Path(f"/proc/{process}/maps").read_text(encoding="utf-8")
    return sum("memfd:optserve" in link for link in links) + maps.count("memfd:optserve")


@pytest.fixture
def driver(shared_driver: SharedDriver) -> SharedDriver:
    """Drive a real server, in shared memory."""
    return shared_driver


def test_a_client_that_is_killed_before_its_step_leaves_nothing_of_it(
    driver: SharedDriver, server: ServerProcess
) -> None:
    session_id = create(driver, spec(SGD(lr=1)))
    command = [sys.executable, "-c", HALF_A_GRADIENT, server.address, session_id]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "written\n"
        client.kill()
    assert_same(driver.download(session_id), model())
    with reopened(driver, session_id) as worker:
        answer = take(worker, 1, gradients(1))
    assert_same(answer.parameters, {name: model()[name] - gradients(1)[name] for name in model()})


def test_a_client_that_scribbles_while_its_steps_run_harms_its_own_numbers_only(
    driver: SharedDriver,
) -> None:
    large = {"large": torch.zeros(1_000_003)}
    mine, theirs = (create(driver, spec(Adam(), parameters=large), large) for _ in range(2))
    done = threading.Event()

    def scribble(worker: SharedWorker) -> None:
        numbers = np.frombuffer(worker.gradients.memory, np.uint8, offset=64)
        generator = np.random.default_rng(0)
        while not done.is_set():
            at = generator.integers(len(numbers) - 4096)
            numbers[at : at + 4096] = generator.integers(256, size=4096, dtype=np.uint8)

    with driver.worker(mine) as worker, driver.worker(theirs) as other:
        thread = threading.Thread(target=scribble, args=(worker,))
        thread.start()
        try:
            step = 1
            for number in range(1, 11):
                with suppress(RefusedError):  # Of the NaNs among what was scribbled.
                    step = take(worker, step, large).result.step + 1
                assert take(other, number, large).result.step == number
        finally:
            done.set()
            thread.join()
        assert_same(driver.download(theirs), large)
    assert driver.get(mine).status.steps == step - 1


def test_a_client_can_neither_cut_the_memory_nor_write_the_parameters(
    driver: SharedDriver,
) -> None:
    session_id = create(driver, spec(SGD(lr=1)))
    with driver.worker(session_id) as worker:
        for region in (worker.offer.parameters, worker.offer.gradients):
            descriptor = os.open(f"/proc/{worker.offer.process}/fd/{region.descriptor}", os.O_RDWR)
            for byte_count in (0, 64, 1 << 20):
                with pytest.raises(PermissionError):
                    os.ftruncate(descriptor, byte_count)
            os.close(descriptor)
        headers = driver.get(session_id).spec.parameters
        with pytest.raises(PermissionError):
            SharedTensors(worker.offer.process, worker.offer.parameters, headers, writable=True)
        assert take(worker, 1, gradients(1)).result.step == 1


def test_when_the_server_is_killed_the_client_is_told_and_keeps_what_it_has() -> None:
    with running_server() as server, optserve_client.connect(server.address, config=SHM) as client:
        session = client.create_session(
            {"w": np.ones(1000, np.float32)}, optimizer=optim.SGD(lr=0.5)
        )
        buffers = session.gradient_buffers()
        buffers["w"][:] = 1
        session.step(buffers)
        parameters = session.parameters
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        buffers["w"][:] = 2
        # The second, if the end of the connection was not noticed before the step was sent.
        with pytest.raises((optserve_client.UnavailableError, optserve_client.StepUnknownError)):
            session.step(buffers)
        assert (parameters["w"] == 0.5).all()
        assert (buffers["w"] == 2).all()


def test_when_the_session_is_deleted_the_client_is_told_and_keeps_what_it_has(
    server: ServerProcess,
) -> None:
    with optserve_client.connect(server.address, config=SHM) as client:
        session = client.create_session({"w": np.ones(9, np.float32)}, optimizer=optim.SGD(lr=0.5))
        buffers = session.gradient_buffers()
        buffers["w"][:] = 1
        session.step(buffers)
        parameters = session.parameters
        client.delete_session(session.session_id)
        with pytest.raises(
            (optserve_client.SessionDeletedError, optserve_client.SessionNotFoundError)
        ):
            session.step(buffers)
        assert (parameters["w"] == 0.5).all()


def test_a_worker_that_comes_back_finds_the_same_memory(driver: SharedDriver) -> None:
    session_id = create(driver, spec(SGD(lr=1)))
    with driver.worker(session_id) as worker:
        take(worker, 1, gradients(1))
        first = worker.offer
    with reopened(driver, session_id) as worker:
        assert isinstance(worker, SharedWorker)
        assert worker.offer == first
        answer = take(worker, 2, gradients(2))
    expected = {name: model()[name] - gradients(1)[name] - gradients(2)[name] for name in model()}
    assert_same(answer.parameters, expected)


def test_workers_share_the_parameters_and_have_gradients_of_their_own(
    driver: SharedDriver,
) -> None:
    session_id = create(driver, spec(SGD(lr=1), workers=2))
    with driver.worker(session_id, 0) as first, driver.worker(session_id, 1) as second:
        assert first.offer.parameters == second.offer.parameters
        assert first.offer.gradients != second.offer.gradients


def test_a_stream_that_was_offered_memory_takes_steps_of_every_form(driver: SharedDriver) -> None:
    session_id = create(driver, spec(SGD(lr=1)))
    expected = model()
    with driver.worker(session_id) as worker:
        for step in range(1, 7):
            expected = {name: each - gradients(step)[name] for name, each in expected.items()}
            # StubWorker's way is begin, chunks and end.
            way = worker.start if step % 2 else super(SharedWorker, worker).start
            answer = way(step, gradients(step)).result(TIMEOUT_S)
            assert_same(answer.parameters, expected)
            assert_same(worker.parameters.read(), expected)


def test_memory_that_was_offered_and_never_used_changes_nothing(
    driver: SharedDriver, process_driver: StubDriver
) -> None:
    session_id = create(driver, spec(Adam()))
    twin = create(driver, spec(Adam()))
    with driver.worker(session_id) as _:
        pass
    with reopened(process_driver, session_id) as worker, process_driver.worker(twin) as other:
        for step in range(1, 4):
            came = take(worker, step, gradients(step))
            wanted = take(other, step, gradients(step))
            assert_same(came.parameters, wanted.parameters)


def test_gradients_that_wait_where_they_are_stay_there(
    driver: SharedDriver, process_driver: StubDriver
) -> None:
    """A worker that has contributed through the stream cannot move to shared memory yet."""
    session_id = create(driver, spec(SGD(lr=1), workers=2))
    with process_driver.worker(session_id, 0) as first:
        first.start(1, gradients(1))
        time.sleep(0.1)
        first.abandon()
    with reopened(process_driver, session_id, 0):  # The server has seen it go.
        pass
    opening = pb.TrainOpen(session_id=session_id, worker=0, shared_memory=True)
    answers = driver.stub.Train(iter([pb.TrainRequest(open=opening)]), timeout=TIMEOUT_S)
    assert not next(answers).opened.HasField("shared_memory")
    list(answers)
    with driver.worker(session_id, 1) as second:
        answer = take(second, 1, gradients(2))
    half = {name: (gradients(1)[name] + gradients(2)[name]) / 2 for name in model()}
    assert_same(answer.parameters, {name: model()[name] - half[name] for name in model()})
    with reopened(driver, session_id, 0) as first:  # Its step is done: it can move now.
        assert isinstance(first, SharedWorker)


def test_uploads_and_downloads_are_of_the_same_memory(driver: SharedDriver) -> None:
    session_id = create(driver, spec(SGD(lr=1)))
    with driver.worker(session_id) as worker:
        take(worker, 1, gradients(1))
        assert_same(driver.download(session_id), worker.parameters.read())
        driver.upload(session_id, gradients(5))
        assert_same(worker.parameters.read(), gradients(5))
        answer = take(worker, 2, gradients(2))
    assert_same(
        answer.parameters, {name: gradients(5)[name] - gradients(2)[name] for name in model()}
    )


@pytest.mark.parametrize(
    "absent", [[2], [0, 0], list(range(3)), [1 << 31]], ids=["beyond", "twice", "many", "huge"]
)
def test_positions_that_are_none_are_refused(driver: SharedDriver, absent: list[int]) -> None:
    session_id = create(driver, spec(SGD(lr=1)))
    with driver.worker(session_id) as worker:
        with refused("INVALID_FIELD", field="absent"):
            worker.send_shared(1, absent).result(TIMEOUT_S)
        assert_same(worker.parameters.read(), model())
        assert take(worker, 1, gradients(1)).result.step == 1


def test_a_shared_step_of_a_worker_without_shared_memory_ends_its_stream(
    driver: SharedDriver,
) -> None:
    session_id = create(driver, spec(SGD(lr=1)))
    worker = SharedWorker(driver.stub, driver.get(session_id).spec.parameters)
    super(SharedWorker, worker).open(opening(session_id, 0, b""))
    with refused("EVENT_OUT_OF_ORDER", field="event"), worker.receiver:
        worker.send_shared(1, []).result(TIMEOUT_S)
    assert_same(driver.download(session_id), model())


def test_fifty_sessions_leave_no_descriptor_and_no_mapping() -> None:
    with running_server() as server, optserve_client.connect(server.address, config=SHM) as client:
        for _ in range(50):
            with client.create_session(
                {"w": np.ones(50_000, np.float32)}, optimizer=optim.Adam()
            ) as session:
                session.step(session.gradient_buffers())
                assert regions_of(server.process.pid) == 6  # Two, each kept open, and mapped.
            assert regions_of(server.process.pid) == 0
        del session
        gc.collect()
        assert regions_of(os.getpid()) == 0


@pytest.mark.parametrize("lane", ["grpc", "shm"])
def test_the_next_session_has_the_memory_of_the_last_one(lane: optserve_client.Lane) -> None:
    values = {"w": np.ones(10_000_000, np.float32)}
    peaks = []
    with (
        running_server() as server,
        optserve_client.connect(
            server.address, config=ClientConfig(lane=lane), progress=False
        ) as client,
    ):
        for _ in range(4):
            with client.create_session(values, optimizer=optim.Adam()) as session:
                session.step(session.gradient_buffers())
            peaks.append(server.peak_bytes())
    # Parameters, gradients and state are four times as large as one of them.
    assert peaks[-1] < peaks[0] + values["w"].nbytes


def test_one_flag_turns_it_off() -> None:
    values = {"w": np.ones(9, np.float32)}
    with running_server("--shared-memory", "false") as server:
        with StubDriver(server.address) as driver:
            assert not driver.stub.GetServerInfo(pb.GetServerInfoRequest()).features
        with optserve_client.connect(server.address, config=SHM) as client:
            session = client.create_session(values, optimizer=optim.SGD(lr=1.0))
            for _ in range(2):
                with pytest.raises(SharedMemoryError, match="offers none"):
                    session.step(values)
            assert session.status().steps == 0
        with optserve_client.connect(server.address) as client:
            session = client.create_session(values, optimizer=optim.SGD(lr=1.0))
            session.step(values)
            assert not session.parameters["w"].any()
        assert regions_of(server.process.pid) == 0


def test_a_client_at_another_address_is_not_offered_it() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # Sends nothing; only asks for the route.
        except OSError:
            pytest.skip("this machine has no network but loopback")
        address = probe.getsockname()[0]
    values = {"w": np.ones(9, np.float32)}
    with running_server("--host", "0.0.0.0", "--allow-plaintext", "true") as server:
        port = server.address.rpartition(":")[2]
        with optserve_client.connect(f"{address}:{port}", config=SHM) as client:
            session = client.create_session(values, optimizer=optim.SGD(lr=1.0))
            with pytest.raises(SharedMemoryError, match="at this address"):
                session.step(values)
        with optserve_client.connect(f"127.0.0.1:{port}", config=SHM) as client:
            session = client.create_session(values, optimizer=optim.SGD(lr=1.0))
            session.step(values)
            assert not session.parameters["w"].any()


def test_a_client_among_other_processes_goes_on_without(
    driver: SharedDriver, server: ServerProcess
) -> None:
    """As in a container of its own with the host's network: the path leads elsewhere."""
    alone = ["unshare", "--pid", "--fork", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("process ids of one's own need root and unshare")
    for prefix, shared in (([], True), (alone, False)):
        session_id = create(driver, spec(SGD(lr=1)))
        command = [*prefix, sys.executable, "-c", A_STEP, server.address, session_id]
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        assert run.returncode == 0, run.stderr
        steps, maps, value = run.stdout.split()
        assert (steps, maps) == ("1", str(shared))
        assert float(value) == pytest.approx(model()["w"][0, 0].item() - 1)


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        ("ipv4:127.0.0.1:50051", True),
        ("ipv4:127.9.8.7:1", True),
        ("ipv6:[::1]:50051", True),
        ("ipv6:%5B::1%5D:50051", True),
        ("ipv6:[::ffff:127.0.0.1]:50051", True),
        ("unix:", True),
        ("unix:/run/optserve.sock", True),
        ("unix-abstract:optserve", True),
        ("ipv4:10.0.0.1:50051", False),
        ("ipv4:0.0.0.0:50051", False),
        ("ipv6:[fe80::1%25eth0]:50051", False),
        ("ipv6:[::ffff:10.0.0.1]:50051", False),
        ("vsock:2:50051", False),
        ("127.0.0.1:50051", False),
        ("ipv4:localhost:50051", False),
        ("", False),
    ],
)
def test_only_loopback_and_unix_sockets_are_local(peer: str, local: bool) -> None:
    assert is_local(peer) is local
