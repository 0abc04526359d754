"""How a step under way ends that is not finished: in a process that goes on, or ends as well."""

from __future__ import annotations

import gc
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from relay import relay
from server_process import ServerProcess, running_server
from torch import Tensor
from unit.client.loops import (
    WIDTH,
    Gated,
    assert_same_bits,
    backward,
    layers,
    remote,
    threads,
    train,
)

import optserve_client as optserve
from optserve_client import ClientConfig
from optserve_client._under_way import StepUnderWay
from optserve_client.torch import RemoteOptimizer

PROLOGUE = """
import sys, torch, optserve_client as optserve
from optserve_client.torch import RemoteOptimizer
model = torch.nn.Sequential(torch.nn.Linear(600, 600), torch.nn.Linear(600, 600))
def connect():
    config = optserve.ClientConfig(lane=sys.argv[2])
    return optserve.connect(sys.argv[1], config=config, progress=False)
def remote(client, **options):
    sgd = optserve.optim.SGD(lr=0.5)
    named = model.named_parameters()
    return RemoteOptimizer(named, client, optimizer=sgd, overlap_backward=True, **options)
def backward():
    model(torch.ones(1, 600)).sum().backward()
"""


@pytest.fixture(params=["grpc", "shm"])
def client(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[optserve.Client]:
    with optserve.connect(server.address, config=ClientConfig(lane=request.param)) as client:
        yield client
    assert not threads()


def test_a_backward_pass_that_fails_is_forgotten(client: optserve.Client) -> None:
    def fail_at_times() -> None:
        if fails:
            raise ZeroDivisionError

    model, local, fails = Gated(fail_at_times), layers(), False
    reference = torch.optim.SGD(local.parameters(), lr=0.1, fused=False)
    with remote(model, client) as optimizer:
        for seed in range(3):
            fails = True
            with pytest.raises(ZeroDivisionError):
                train(model, optimizer, seed)
            fails = False
            train(model, optimizer, seed)
            train(local, reference, seed)
            assert_same_bits(model, local)
        assert (optimizer.session.steps, optimizer.steps_given_up) == (3, 3)


def test_a_refused_step_changes_nothing_and_the_next_one_goes_on(client: optserve.Client) -> None:
    model, local = layers(), layers()
    reference = torch.optim.SGD(local.parameters(), lr=0.1, fused=False)
    with remote(model, client) as optimizer:
        loss: Tensor = model(torch.full((1, WIDTH), float("nan"))).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        with pytest.raises(optserve.NonFiniteGradientError):
            optimizer.step()
        assert_same_bits(model, local)
        train(model, optimizer, 1)
        train(local, reference, 1)
        assert_same_bits(model, local)
        assert optimizer.steps_given_up == 0


def test_what_is_closed_in_the_middle_leaves_its_seat_to_others(client: optserve.Client) -> None:
    model = layers()
    with remote(model, client) as creator:
        session_id = creator.session.session_id
        for _ in range(3):
            joined = RemoteOptimizer.join(
                model.named_parameters(), client, session_id, worker=0, overlap_backward=True
            )
            backward(model, 1)
            assert threads()
            joined.close()
            creator.zero_grad()
            assert not threads()
        backward(model, 1)
        assert creator.step().step == 1
    with pytest.raises(optserve.SessionNotFoundError):
        client.get_session(session_id)


def test_a_closed_client_ends_what_is_under_way(server: ServerProcess) -> None:
    model = layers()
    client = optserve.connect(server.address, config=ClientConfig(lane="grpc"))
    optimizer = remote(model, client)
    session_id = optimizer.session.session_id
    backward(model, 1)
    client.close()
    with pytest.raises(optserve.ClosedError):
        optimizer.step()
    backward(model, 2)  # Nobody sends anything any more, and that is no reason to fail.
    optimizer.close()
    assert not threads()
    with optserve.connect(server.address) as other:
        other.delete_session(session_id)


def test_an_optimizer_that_is_forgotten_ends_what_is_under_way(client: optserve.Client) -> None:
    model = layers()
    optimizer = remote(model, client)
    session_id = optimizer.session.session_id
    backward(model, 1)
    del optimizer
    gc.collect()
    deadline_s = time.monotonic() + 20
    while threads():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    backward(model, 2)
    assert not threads()
    client.delete_session(session_id)


def test_a_connection_that_is_cut_before_the_step_costs_nothing_but_time(
    server: ServerProcess,
) -> None:
    model, local = layers(), layers()
    reference = torch.optim.SGD(local.parameters(), lr=0.1, fused=False)
    with (
        relay(server.address) as wire,
        optserve.connect(wire.address, config=ClientConfig(lane="grpc")) as client,
        remote(model, client) as optimizer,
    ):
        for seed in range(3):
            optimizer.zero_grad()
            backward(model, seed)
            if seed == 1:
                wire.cut()
                while threads():
                    time.sleep(0.01)
            optimizer.step()
            train(local, reference, seed)
        assert_same_bits(model, local)
        assert (optimizer.session.steps, optimizer.steps_given_up) == (3, 1)


def test_a_pause_that_is_too_long_for_the_server_costs_nothing_but_time() -> None:
    model, local = layers(), layers()
    reference = torch.optim.SGD(local.parameters(), lr=0.1, fused=False)
    with (
        running_server("--stall-timeout-s", "1") as server,
        optserve.connect(server.address, config=ClientConfig(lane="grpc")) as client,
        remote(model, client) as optimizer,
    ):
        backward(model, 0)
        backward(local, 0)
        while threads():
            time.sleep(0.01)
        optimizer.step()
        reference.step()
        train(model, optimizer, 1)
        train(local, reference, 1)
        assert_same_bits(model, local)
        assert (optimizer.session.steps, optimizer.steps_given_up) == (2, 1)


@pytest.fixture
def no_cycles() -> Iterator[None]:
    """Let memory go only when nothing refers to it: nobody comes to look for cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_cycles")
def test_nothing_is_left_after_many_rounds(client: optserve.Client) -> None:
    model = layers()
    resident_bytes = []
    with remote(model, client) as optimizer:
        for round_ in range(50):
            optimizer.zero_grad()
            backward(model, round_)
            if round_ % 2:  # Else it is given up.
                optimizer.step()
                assert not threads()
            resident_bytes.append(_resident_bytes())
        optimizer.zero_grad()
        assert not threads()
        assert optimizer.steps_given_up == 25
    assert not [each for each in gc.get_objects() if type(each) is StepUnderWay]
    gradients_bytes = 4 * 3 * WIDTH * WIDTH
    assert resident_bytes[-1] - resident_bytes[9] < 4 * gradients_bytes  # Of 40 rounds.


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize()


LANES = pytest.mark.parametrize("lane", ["grpc", "shm"])


def run(script: str, server: ServerProcess, lane: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-W", "error", "-c"),
            *(PROLOGUE + textwrap.dedent(script), server.address, lane),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@LANES
@pytest.mark.parametrize("where", ["optimizer.step()", "wait()"], ids=["step", "backward"])
def test_ctrl_c_ends_the_process_and_deletes_its_session(
    lane: str, where: str, server: ServerProcess
) -> None:
    with optserve.connect(server.address) as client:
        before = len(list(client.list_sessions()))
        # The step waits for another worker; the hook is called in the middle of a backward pass.
        script = f"""
            import time
            def wait():
                print("waiting", flush=True)
                time.sleep(60)
            with connect() as client, remote(client, workers=2) as optimizer:
                if {where!r} == "wait()":
                    model[0].bias.register_hook(lambda _: wait())
                backward()
                print("waiting", flush=True)
                {where}
        """
        process = run(script, server, lane)
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGINT
        assert stderr.splitlines()[-1].startswith("KeyboardInterrupt")
        assert "Exception iterating requests" not in stderr
        assert len(list(client.list_sessions())) == before


@LANES
def test_a_process_that_closes_nothing_ends_at_once_and_silently(
    lane: str, server: ServerProcess
) -> None:
    script = """
        client = connect()
        optimizer = remote(client)
        backward()
        optimizer.step()
        backward()
        print(optimizer.session.session_id)
    """
    process = run(script, server, lane)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    with optserve.connect(server.address) as client:
        assert client.delete_session(stdout.strip()).steps == 1
