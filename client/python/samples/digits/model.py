"""A perceptron with one hidden layer, forward and backward, in NumPy.

There is no loss here: the server computes it, and its gradient with respect to the logits.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .data import CLASSES, PIXELS

WEIGHTS = ("hidden.weight", "output.weight")
BIASES = ("hidden.bias", "output.bias")

_HIDDEN = 128

_Array = NDArray[np.float32]


def initial_parameters(seed: int) -> dict[str, _Array]:
    """Return weights of shape (inputs, outputs), and biases of zero.

    The weights are normal, with the variance that He et al. derive for ReLU: arXiv:1502.01852.
    """
    normal = np.random.default_rng(seed).standard_normal
    return {
        "hidden.weight": (normal((PIXELS, _HIDDEN)) * np.sqrt(2 / PIXELS)).astype(np.float32),
        "hidden.bias": np.zeros(_HIDDEN, np.float32),
        "output.weight": (normal((_HIDDEN, CLASSES)) * np.sqrt(2 / _HIDDEN)).astype(np.float32),
        "output.bias": np.zeros(CLASSES, np.float32),
    }


def forward(parameters: Mapping[str, _Array], images: _Array) -> tuple[_Array, _Array]:
    """Return the hidden layer, shape (N, hidden), and the logits, shape (N, CLASSES)."""
    hidden = np.maximum(images @ parameters["hidden.weight"] + parameters["hidden.bias"], 0)
    return hidden, hidden @ parameters["output.weight"] + parameters["output.bias"]


def backward(
    parameters: Mapping[str, _Array], images: _Array, hidden: _Array, logits_gradient: _Array
) -> dict[str, _Array]:
    """Return each parameter's gradient, given the loss's gradient with respect to the logits."""
    hidden_gradient = (logits_gradient @ parameters["output.weight"].T) * (hidden > 0)
    return {
        "hidden.weight": images.T @ hidden_gradient,
        "hidden.bias": hidden_gradient.sum(axis=0),
        "output.weight": hidden.T @ logits_gradient,
        "output.bias": logits_gradient.sum(axis=0),
    }
