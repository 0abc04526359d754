"""Train a classifier with NumPy alone: the server has the loss, its gradient, and the optimizer.

python quickstart.py [HOST:PORT]
"""

from __future__ import annotations

import sys

import numpy as np

import optserve_client as optserve

TARGET = sys.argv[1] if len(sys.argv) > 1 else "localhost:50051"

# Two clouds of points, which a straight line parts.
rng = np.random.default_rng(0)
labels = rng.integers(0, 2, size=200)
points = (rng.standard_normal((200, 2)) + 3 * labels[:, None]).astype(np.float32)

with (
    optserve.connect(TARGET) as client,
    client.create_session(
        {"w": np.zeros((2, 2), np.float32), "b": np.zeros(2, np.float32)},
        optimizer=optserve.optim.Adam(lr=0.1),
        scheduler=optserve.lr_scheduler.StepLR(step_size=20, gamma=0.5),
        loss=optserve.nn.CrossEntropyLoss(),
    ) as session,
):
    for step in range(1, 51):
        p = session.parameters
        result = session.evaluate_loss(points @ p["w"] + p["b"], labels, split="train")
        session.step({"w": points.T @ result.gradient, "b": result.gradient.sum(axis=0)})
        if step % 10 == 0:
            print(f"step {step:2}  loss {result.loss:.4f}  accuracy {result.accuracy:.2f}")
