from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from server_process import ServerProcess
from torch import nn

import optserve_client as optserve
from optserve_client.torch import RemoteOptimizer

SGD = optserve.optim.SGD(lr=0.1)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[optserve.Client]:
    with optserve.connect(server.address) as client:
        yield client


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, 4)
        self.output = nn.Linear(4, 1)


def model(dtype: torch.dtype = torch.float32) -> Network:
    torch.manual_seed(0)
    return Network().to(dtype)


def set_gradients(module: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)


def assert_same_bits(remote: nn.Module, local: nn.Module) -> None:
    for mine, expected in zip(remote.parameters(), local.parameters(), strict=True):
        assert mine.dtype == expected.dtype
        assert torch.equal(mine, expected)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_remote_steps_are_torchs_own_bit_for_bit(
    client: optserve.Client, dtype: torch.dtype
) -> None:
    remote, local = model(dtype), model(dtype)
    reference = torch.optim.Adagrad(local.parameters(), lr=0.1, fused=False)
    adagrad = optserve.optim.Adagrad(lr=0.1, fused=False)
    with RemoteOptimizer(remote.named_parameters(), client, optimizer=adagrad) as optimizer:
        for seed in range(3):
            set_gradients(remote, seed)
            set_gradients(local, seed)
            reference.step()
            assert optimizer.step().step == seed + 1
            assert_same_bits(remote, local)


def test_groups_and_schedule_are_torchs(client: optserve.Client) -> None:
    remote, local = model(), model()
    groups: list[dict[str, Any]] = [
        {"params": local.hidden.parameters()},
        {"params": local.output.parameters(), "lr": 0.01, "momentum": 0.5},
    ]
    reference = torch.optim.SGD(groups, lr=0.1, fused=False)
    schedule = torch.optim.lr_scheduler.ExponentialLR(reference, gamma=0.5)
    with RemoteOptimizer(
        [
            {"params": remote.hidden.named_parameters(prefix="hidden"), "name": "hidden"},
            {
                "params": remote.output.named_parameters(prefix="output"),
                "lr": 0.01,
                "momentum": 0.5,
            },
        ],
        client,
        optimizer=optserve.optim.SGD(lr=0.1, fused=False),
        scheduler=optserve.lr_scheduler.ExponentialLR(gamma=0.5),
        schedule_unit="epochs",
    ) as optimizer:
        for seed in range(3):
            set_gradients(remote, seed)
            set_gradients(local, seed)
            reference.step()
            schedule.step()
            result = optimizer.step()
            optimizer.end_epoch()
            assert_same_bits(remote, local)
        assert result.rates == {"hidden": 0.025, "group1": 0.0025}


def test_a_parameter_without_gradient_stays(client: optserve.Client) -> None:
    remote = model()
    before = remote.hidden.weight.detach().clone()
    adamw = optserve.optim.AdamW(lr=0.1)
    with RemoteOptimizer(remote.named_parameters(), client, optimizer=adamw) as optimizer:
        set_gradients(remote, 0)
        remote.hidden.weight.grad = None
        optimizer.step()
        assert torch.equal(remote.hidden.weight, before)
        optimizer.zero_grad(set_to_none=False)
        assert all((p.grad == 0).all() for p in remote.parameters() if p.grad is not None)
        optimizer.zero_grad()
        assert all(p.grad is None for p in remote.parameters())


def test_a_parameter_that_is_a_view_with_strides_is_written_in_place(
    client: optserve.Client,
) -> None:
    weight = torch.zeros(3, 2).T.requires_grad_()
    storage = weight.data_ptr()
    sgd = optserve.optim.SGD(lr=1.0)
    with RemoteOptimizer([("w", weight)], client, optimizer=sgd) as optimizer:
        weight.grad = torch.arange(6.0).reshape(2, 3)
        optimizer.step()
    assert weight.data_ptr() == storage
    assert torch.equal(weight, -torch.arange(6.0).reshape(2, 3))


def test_a_backward_pass_through_values_of_before_the_step_is_refused_by_torch(
    client: optserve.Client,
) -> None:
    weight = torch.ones(2, requires_grad=True)
    sgd = optserve.optim.SGD(lr=1.0)
    with RemoteOptimizer([("w", weight)], client, optimizer=sgd) as optimizer:
        loss = (weight * weight).sum()
        weight.grad = torch.ones(2)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()  # type: ignore[no-untyped-call]


def test_a_refused_step_changes_no_parameter(client: optserve.Client) -> None:
    remote, before = model(), model()
    sgd = optserve.optim.SGD(lr=1.0)
    with RemoteOptimizer(remote.named_parameters(), client, optimizer=sgd) as optimizer:
        set_gradients(remote, 0)
        assert remote.hidden.bias.grad is not None
        remote.hidden.bias.grad[0] = float("nan")
        with pytest.raises(optserve.NonFiniteGradientError):
            optimizer.step()
        assert_same_bits(remote, before)


def test_two_workers_share_a_session(client: optserve.Client) -> None:
    first, second = model(), model()
    with torch.no_grad():
        second.hidden.weight.zero_()
    sgd = optserve.optim.SGD(lr=0.5)
    with (
        RemoteOptimizer(first.named_parameters(), client, optimizer=sgd, workers=2) as one,
        RemoteOptimizer.join(
            second.named_parameters(), client, one.session.session_id, worker=1
        ) as two,
        ThreadPoolExecutor() as threads,
    ):
        assert_same_bits(first, second)
        set_gradients(first, 0)
        set_gradients(second, 1)
        pending = threads.submit(two.step)
        one.step()
        pending.result(30)
        assert_same_bits(first, second)


def test_another_model_cannot_join(client: optserve.Client) -> None:
    sgd = optserve.optim.SGD(lr=0.5)
    with (
        RemoteOptimizer(model().named_parameters(), client, optimizer=sgd) as optimizer,
        pytest.raises(ValueError, match="other names"),
    ):
        RemoteOptimizer.join(
            nn.Linear(1, 1).named_parameters(), client, optimizer.session.session_id, worker=0
        )


def test_parameters_need_names_that_stand_once(client: optserve.Client) -> None:
    sgd = optserve.optim.SGD(lr=0.5)
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match=r"model\.named_parameters\(\)"):
        RemoteOptimizer(model().parameters(), client, optimizer=sgd)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'w' stands twice"):
        RemoteOptimizer([("w", weight), ("w", weight.clone())], client, optimizer=sgd)
    with pytest.raises(ValueError, match="'v' stands twice"):
        RemoteOptimizer([("w", weight), ("v", weight)], client, optimizer=sgd)
    with pytest.raises(ValueError, match="learning_rate"):
        RemoteOptimizer([{"params": [("w", weight)], "learning_rate": 1}], client, optimizer=sgd)


def test_a_sparse_gradient_is_refused(client: optserve.Client) -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    sgd = optserve.optim.SGD(lr=0.5)
    with RemoteOptimizer(embedding.named_parameters(), client, optimizer=sgd) as optimizer:
        embedding(torch.tensor([1])).sum().backward()
        with pytest.raises(TypeError, match="to_dense"):
            optimizer.step()


def test_who_resumes_has_the_values_of_the_session(client: optserve.Client) -> None:
    mine, theirs = model(), model()
    with RemoteOptimizer(mine.named_parameters(), client, optimizer=SGD) as optimizer:
        late = RemoteOptimizer.join(
            theirs.named_parameters(), client, optimizer.session.session_id, worker=0
        )
        for seed in range(3):
            set_gradients(mine, seed)
            optimizer.step()
        optimizer.session.close()
        assert late.resume() == late.session.steps == 3
        assert_same_bits(theirs, mine)
        set_gradients(theirs, 3)
        assert late.step().step == 4
        late.close()
        client.delete_session(late.session.session_id)
