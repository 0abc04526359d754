"""The handwritten digits that scikit-learn ships: 1,797 real images of 8 by 8 pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

PIXELS = 64
CLASSES = 10

_PIXEL_MAX = 16.0  # Each pixel counts the dots of a field of 4 by 4 that the pen has touched.
_VALIDATION_SHARE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Images, and which digits they show."""

    images: NDArray[np.float32]
    """Shape (N, PIXELS), from 0 to 1."""
    digits: NDArray[np.int64]
    """Shape (N)."""

    def __len__(self) -> int:
        return len(self.digits)

    def batches(self, size: int, order: np.random.Generator) -> Iterator[Examples]:
        """Yield all examples once, in a new order, ``size`` at a time; the last are fewer."""
        shuffled = order.permutation(len(self))
        for start in range(0, len(self), size):
            chosen = shuffled[start : start + size]
            yield Examples(images=self.images[chosen], digits=self.digits[chosen])


def load(seed: int) -> tuple[Examples, Examples]:
    """Return the examples to train on and those to validate on; each digit is in both."""
    images, digits = load_digits(return_X_y=True)
    images = (images / _PIXEL_MAX).astype(np.float32)
    train_images, validation_images, train_digits, validation_digits = train_test_split(
        images,
        digits.astype(np.int64),
        test_size=_VALIDATION_SHARE,
        stratify=digits,
        random_state=seed,
    )
    return (
        Examples(images=train_images, digits=train_digits),
        Examples(images=validation_images, digits=validation_digits),
    )
