"""Train a torch model as usual, but for the optimizer: its steps are the server's.

python torch_loop.py [HOST:PORT]
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import optserve_client as optserve
from optserve_client.torch import RemoteOptimizer

TARGET = sys.argv[1] if len(sys.argv) > 1 else "localhost:50051"

torch.manual_seed(0)
inputs = torch.rand(256, 1) * 6 - 3
targets = inputs.sin()
model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))

with (
    optserve.connect(TARGET) as client,
    RemoteOptimizer(
        [
            {"params": model[0].named_parameters(prefix="hidden")},
            {"params": model[2].named_parameters(prefix="output"), "lr": 0.005},
        ],
        client,
        optimizer=optserve.optim.Adam(lr=0.02),
        scheduler=optserve.lr_scheduler.ExponentialLR(gamma=0.9),
        schedule_unit="epochs",
    ) as optimizer,
):
    for epoch in range(1, 11):
        for batch in range(0, 256, 32):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(
                model(inputs[batch : batch + 32]), targets[batch : batch + 32]
            )
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        optimizer.end_epoch()
        print(f"epoch {epoch:2}  loss {nn.functional.mse_loss(model(inputs), targets).item():.4f}")
