"""Gradients that are sent while the backward pass computes the others: no bit may change."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import pytest
import torch
from relay import relay
from server_process import ServerProcess, running_server
from torch import Tensor, nn

import optserve_client as optserve
from optserve_client import ClientConfig, Lane, Wire, WireEncoding
from optserve_client._under_way import StepUnderWay
from optserve_client.torch import RemoteOptimizer

WIDTH = 640  # Two of three layers fill three messages: enough for a piece of the answer.
SGD = optserve.optim.SGD(lr=0.1, fused=False)
LANES: tuple[Lane, ...] = ("grpc", "shm")

Tamper = Callable[[nn.Module], object]
Stepper: TypeAlias = RemoteOptimizer | torch.optim.Optimizer


@pytest.fixture(scope="module")
def eager() -> Iterator[ServerProcess]:
    """Start a server that answers steps ahead, though its clients are near."""
    with running_server("--overlap", "on") as process:
        yield process


@pytest.fixture(params=LANES)
def client(request: pytest.FixtureRequest, eager: ServerProcess) -> Iterator[optserve.Client]:
    with optserve.connect(eager.address, config=ClientConfig(lane=request.param)) as client:
        yield client
    assert not threads()


@pytest.fixture
def far_client(eager: ServerProcess) -> Iterator[optserve.Client]:
    """Yield a client whose tensors have to travel."""
    with optserve.connect(eager.address, config=ClientConfig(lane="grpc")) as client:
        yield client
    assert not threads()


def threads() -> list[str]:
    """Return the threads in which steps are under way."""
    return [thread.name for thread in threading.enumerate() if thread.name == "optserve-step"]


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))


def backward(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    model(torch.randn(4, WIDTH)).square().mean().backward()


def train(model: nn.Module, stepper: Stepper, seed: int, tamper: Tamper = lambda _: None) -> None:
    """Take a step as every loop does, and do something to the gradients before it."""
    stepper.zero_grad()
    backward(model, seed)
    tamper(model)
    stepper.step()


def remote(model: nn.Module, client: optserve.Client, **options: Any) -> RemoteOptimizer:  # noqa: ANN401
    options = {"optimizer": SGD, "overlap_backward": True, **options}
    return RemoteOptimizer(model.named_parameters(), client, **options)


def assert_same_bits(mine: nn.Module, expected: nn.Module) -> None:
    for ours, theirs in zip(mine.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_steps_are_torchs_own_bit_for_bit(client: optserve.Client) -> None:
    model, local = layers(), layers()
    reference = torch.optim.Adam(local.parameters(), lr=0.01, fused=False)
    adam = optserve.optim.Adam(lr=0.01, fused=False)
    with remote(model, client, optimizer=adam) as optimizer:
        for seed in range(4):
            train(model, optimizer, seed)
            train(local, reference, seed)
            assert_same_bits(model, local)
        assert (optimizer.session.steps, optimizer.steps_given_up) == (4, 0)


@pytest.mark.parametrize("encoding", ["BF16", "FP16", "INT8_BLOCKS"])
def test_encoded_steps_are_the_same_bit_for_bit(
    far_client: optserve.Client, encoding: WireEncoding
) -> None:
    wire = Wire(gradients=encoding, parameters=encoding)
    model, plain = layers(), layers()
    with (
        remote(model, far_client, wire=wire) as optimizer,
        remote(plain, far_client, wire=wire, overlap_backward=False) as expected,
    ):
        for seed in range(4):
            train(model, optimizer, seed)
            train(plain, expected, seed)
            assert_same_bits(model, plain)
        assert optimizer.steps_given_up == 0


def accumulate(model: nn.Module) -> None:
    backward(model, 99)


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def unscale(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.div_(8)


def replace_one(model: nn.Module) -> None:
    parameter = next(model.parameters())
    parameter.grad = torch.ones_like(parameter)


def drop_one(model: nn.Module) -> None:
    next(model.parameters()).grad = None


@pytest.mark.parametrize(
    "tamper", [accumulate, clip, unscale, replace_one, drop_one], ids=lambda each: each.__name__
)
def test_what_happens_to_gradients_after_the_backward_pass_counts(
    client: optserve.Client, tamper: Tamper
) -> None:
    model, local = layers(), layers()
    reference = torch.optim.SGD(local.parameters(), lr=0.1, fused=False)
    with remote(model, client) as optimizer:
        for seed in range(3):
            change = tamper if seed != 1 else lambda _: None
            train(model, optimizer, seed, change)
            train(local, reference, seed, change)
            assert_same_bits(model, local)
        assert (optimizer.session.steps, optimizer.steps_given_up) == (3, 2)


def test_gradients_may_accumulate_over_steps_that_nobody_clears(client: optserve.Client) -> None:
    model, local = layers(), layers()
    reference = torch.optim.SGD(local.parameters(), lr=0.1, fused=False)
    with remote(model, client) as optimizer:
        for seed in range(3):
            backward(model, seed)
            backward(local, seed)
            optimizer.step()
            reference.step()
            assert_same_bits(model, local)
        assert optimizer.steps_given_up == 0


class Branches(nn.Module):
    """Takes one of two ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ways = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.way = 0

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = self.ways[self.way](inputs)
        outputs: Tensor = self.ways[2](inputs)
        return outputs


def test_a_branch_that_was_not_taken_stays_as_it_is(client: optserve.Client) -> None:
    model, local = Branches(), Branches()
    reference = torch.optim.AdamW(local.parameters(), lr=0.01, fused=False)
    adamw = optserve.optim.AdamW(lr=0.01, fused=False)
    with remote(model, client, optimizer=adamw) as optimizer:
        for seed in range(3):
            model.way = local.way = seed % 2
            train(model, optimizer, seed)
            train(local, reference, seed)
            assert_same_bits(model, local)
        assert optimizer.steps_given_up == 3


def test_frozen_parameters_are_not_waited_for(client: optserve.Client) -> None:
    model, local = layers(), layers()
    for module in (model, local):
        module[1].weight.requires_grad = False
    reference = torch.optim.AdamW(local.parameters(), lr=0.01, fused=False)
    adamw = optserve.optim.AdamW(lr=0.01, fused=False)
    with remote(model, client, optimizer=adamw) as optimizer:
        for seed in range(3):
            train(model, optimizer, seed)
            train(local, reference, seed)
            assert_same_bits(model, local)
        assert optimizer.steps_given_up == 0


class Gate(torch.autograd.Function):
    """Passes everything on; on the way back it calls something first."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, call: Callable[[], object]) -> Tensor:  # noqa: ANN401
        ctx.call = call
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        ctx.call()
        return gradients[0], None


class Gated(nn.Module):
    """Layers, of which the first one gets its gradient only after a call."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self.layers = layers()
        self.call = call

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers[1:](Gate.apply(self.layers[0](inputs), self.call))  # type: ignore[no-untyped-call]
        return outputs


def test_gradients_travel_and_are_answered_before_the_backward_pass_has_ended(
    eager: ServerProcess,
) -> None:
    layer_bytes = 4 * WIDTH * WIDTH
    came: list[bool] = []
    with (
        relay(eager.address) as wire,
        optserve.connect(wire.address, config=ClientConfig(lane="grpc")) as client,
    ):
        # The last layer's gradient is there; of its answer the server has computed a first piece.
        model = Gated(lambda: came.append(wire.wait_for(sent=sent, answered=answered)))
        # Only fused kernels compute tensors of this size in pieces.
        with remote(model, client, optimizer=optserve.optim.SGD(lr=0.1)) as optimizer:
            for seed in range(2):
                sent, answered = wire.sent + layer_bytes, wire.answered + layer_bytes // 2
                train(model, optimizer, seed)
            assert optimizer.steps_given_up == 0
    assert came == [True, True]


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


def test_a_closed_client_ends_what_is_under_way(eager: ServerProcess) -> None:
    model = layers()
    client = optserve.connect(eager.address, config=ClientConfig(lane="grpc"))
    optimizer = remote(model, client)
    session_id = optimizer.session.session_id
    backward(model, 1)
    client.close()
    with pytest.raises(optserve.ClosedError):
        optimizer.step()
    backward(model, 2)  # Nobody sends anything any more, and that is no reason to fail.
    optimizer.close()
    assert not threads()
    with optserve.connect(eager.address) as other:
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


def test_two_models_are_trained_in_turn(client: optserve.Client) -> None:
    models, expected = [layers(), layers()], [layers(), layers()]
    with remote(models[0], client) as first, remote(models[1], client) as second:
        for seed in range(3):
            for number, optimizer in enumerate((first, second)):
                optimizer.zero_grad()
                backward(models[number], seed + 10 * number)
            second.step()
            first.step()
        assert first.steps_given_up == second.steps_given_up == 0
    for number, local in enumerate(expected):
        reference = torch.optim.SGD(local.parameters(), lr=0.1, fused=False)
        for seed in range(3):
            train(local, reference, seed + 10 * number)
        assert_same_bits(models[number], local)


def test_two_workers_step_with_the_mean_of_their_gradients(client: optserve.Client) -> None:
    models, local = [layers(), layers()], layers()
    reference = torch.optim.SGD(local.parameters(), lr=0.1, fused=False)
    with (
        remote(models[0], client, workers=2) as creator,
        RemoteOptimizer.join(
            models[1].named_parameters(),
            client,
            creator.session.session_id,
            worker=1,
            overlap_backward=True,
        ) as joiner,
        ThreadPoolExecutor(1) as other,
    ):
        for seed in range(2):
            for number, optimizer in enumerate((creator, joiner)):
                optimizer.zero_grad()
                backward(models[number], seed + 10 * number)
            gradients = [[each.grad for each in model.parameters()] for model in models]
            for each, mine, theirs in zip(local.parameters(), *gradients, strict=True):
                each.grad = (mine + theirs) / 2
            reference.step()
            pending = other.submit(joiner.step)
            creator.step()
            pending.result(30)
            for model in models:
                assert_same_bits(model, local)
        assert creator.steps_given_up == joiner.steps_given_up == 0


def test_a_connection_that_is_cut_before_the_step_costs_nothing_but_time(
    eager: ServerProcess,
) -> None:
    model, local = layers(), layers()
    reference = torch.optim.SGD(local.parameters(), lr=0.1, fused=False)
    with (
        relay(eager.address) as wire,
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


def test_nothing_is_left_after_many_rounds(client: optserve.Client) -> None:
    model = layers()
    gradients: list[weakref.ref[Tensor]] = []
    with remote(model, client) as optimizer:
        for round_ in range(50):
            optimizer.zero_grad()
            backward(model, round_)
            if round_ % 3:  # Else it is given up.
                optimizer.step()
                assert not threads()
            gradients += [
                weakref.ref(each.grad) for each in model.parameters() if each.grad is not None
            ]
        optimizer.zero_grad()
        assert not threads()
        assert [each for each in gradients if each() is not None] == []
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is StepUnderWay]


def test_a_small_model_takes_its_steps_in_one_message(client: optserve.Client) -> None:
    model = nn.Linear(WIDTH, 1)
    with remote(model, client) as optimizer:
        backward(model, 0)
        assert not threads()
        assert optimizer.step().step == 1
