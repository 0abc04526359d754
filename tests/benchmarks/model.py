"""The models that are trained: their shapes, and seeded values and gradients for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32]
Tensors: TypeAlias = Mapping[str, Array]
Shape: TypeAlias = tuple[int, ...]

RESNET50_WIDTH = 64
RESNET50_STAGES = (
    (1, 3),
    (2, 4),
    (4, 6),
    (8, 3),
)  # Width of a stage in units of the first; blocks.
RESNET50_CLASSES = 1000

PERCEPTRON_MAX = (
    500_000  # Up to here a model is a perceptron: nobody's small model has 161 tensors.
)

GRADIENT_SETS = 2  # Used in turn: two differ from step to step and fit into memory.
_SEED = 20_240_501


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The parameters of a model, by name, in their order."""

    shapes: Mapping[str, Shape]

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def tensor_bytes(self) -> int:
        """How many bytes its parameters take in float32: what one direction of a step carries."""
        return 4 * self.parameters

    def initial(self) -> dict[str, Array]:
        """Return the same initial values each time."""
        return self._filled(_SEED)

    def gradient_sets(self) -> Sequence[Tensors]:
        """Return the gradients that the steps use in turn; the same each time.

        They are as large as the values, so that even rounded to 8 bits nobody can mistake
        parameters that have stepped for others that have not.
        """
        return [self._filled(_SEED + number) for number in range(1, GRADIENT_SETS + 1)]

    def _filled(self, seed: int) -> dict[str, Array]:
        generator = np.random.default_rng(seed)
        return {
            name: generator.standard_normal(shape, dtype=np.float32)
            for name, shape in self.shapes.items()
        }


def model_of(parameters: int) -> Model:
    """Return a model with about so many parameters.

    Up to half a million, a perceptron with one hidden layer: 4 tensors, and exactly as many
    parameters as asked for if that is a multiple of 1,000. Beyond, a ResNet-50 of another width:
    161 tensors; the width that comes closest. 25,557,032 are the ResNet-50 itself.
    """
    if parameters <= PERCEPTRON_MAX:
        return Model(shapes=perceptron(parameters))
    # Almost all parameters are in convolutions, which have width x width of them.
    guess = round(RESNET50_WIDTH * math.sqrt(parameters / 25.6e6))
    candidates = (Model(shapes=resnet50(width)) for width in range(max(1, guess - 8), guess + 9))
    return min(candidates, key=lambda model: abs(model.parameters - parameters))


def perceptron(parameters: int) -> dict[str, Shape]:
    """Return the shapes of a perceptron: three fifths of the parameters in its hidden layer."""
    hidden = 24
    features = parameters // 40 - 1  # hidden x (features + 1) = 0.6 parameters
    classes = 2 * parameters // 125  # (hidden + 1) x classes = 0.4 parameters
    return {
        "hidden.weight": (hidden, features),
        "hidden.bias": (hidden,),
        "output.weight": (classes, hidden),
        "output.bias": (classes,),
    }


def resnet50(width: int = RESNET50_WIDTH) -> dict[str, Shape]:
    """Return the shapes of torchvision's ResNet-50, in its order and under its names.

    He et al. 2015, arXiv:1512.03385. ``width`` is the number of channels behind the stem, 64 in the
    paper; all others grow with it.
    """
    shapes: dict[str, Shape] = {}
    shapes.update(_convolution("conv1", "bn1", (width, 3, 7, 7)))
    channels = width
    for stage, (factor, blocks) in enumerate(RESNET50_STAGES, start=1):
        inner, outer = width * factor, 4 * width * factor
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            shapes.update(_convolution(f"{name}.conv1", f"{name}.bn1", (inner, channels, 1, 1)))
            shapes.update(_convolution(f"{name}.conv2", f"{name}.bn2", (inner, inner, 3, 3)))
            shapes.update(_convolution(f"{name}.conv3", f"{name}.bn3", (outer, inner, 1, 1)))
            if block == 0:
                pair = (f"{name}.downsample.0", f"{name}.downsample.1")
                shapes.update(_convolution(*pair, (outer, channels, 1, 1)))
            channels = outer
    return {**shapes, "fc.weight": (RESNET50_CLASSES, channels), "fc.bias": (RESNET50_CLASSES,)}


def _convolution(name: str, norm: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    """Yield a convolution's weight, and those of the batch norm behind it."""
    yield f"{name}.weight", shape
    yield f"{norm}.weight", shape[:1]
    yield f"{norm}.bias", shape[:1]
