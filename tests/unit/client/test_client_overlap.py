"""Gradients that are sent while the backward pass computes the others: no bit may change."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from relay import relay
from server_process import ServerProcess, running_server
from torch import Tensor, nn
from unit.client.loops import (
    WIDTH,
    Gated,
    Tamper,
    assert_same_bits,
    backward,
    layers,
    remote,
    threads,
    train,
)

import optserve_client as optserve
from optserve_client import ClientConfig, Lane, Wire, WireEncoding
from optserve_client.torch import RemoteOptimizer

LANES: tuple[Lane, ...] = ("grpc", "shm")


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


def test_a_small_model_takes_its_steps_in_one_message(client: optserve.Client) -> None:
    model = nn.Linear(WIDTH, 1)
    with remote(model, client) as optimizer:
        backward(model, 0)
        assert not threads()
        assert optimizer.step().step == 1
