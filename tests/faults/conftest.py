"""A ground for mistakes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from faults.ground import Ground, Mistakes, ground


@pytest.fixture(scope="session")
def shared_ground() -> Iterator[Ground]:
    """Lay one ground for all mistakes that leave it as it was."""
    with ground() as laid:
        yield laid


@pytest.fixture
def mistakes(shared_ground: Ground) -> Mistakes:
    return Mistakes(shared_ground)
