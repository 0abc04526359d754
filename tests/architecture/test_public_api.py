"""What a user may import from the Python client is said in ``__all__``, to the last name."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import Descriptor
from sources import modules

import optserve_client
from optserve.v1 import loss_pb2, optimizer_pb2, scheduler_pb2
from optserve_client import errors, lr_scheduler, nn, optim

FACADES = [f"optserve_client{name}" for name in ("", ".lr_scheduler", ".nn", ".optim")]
"""Modules that only show what others define."""

WITH_CODE = ["optserve_client.aio", "optserve_client.torch"]
"""Modules that a user imports and that have code of their own."""


@pytest.mark.parametrize("module", FACADES)
def test_facade_names_all_that_it_shows(module: str) -> None:
    names = importlib.import_module(module).__all__
    assert sorted(names) == sorted(_shown(module))


@pytest.mark.parametrize("module", WITH_CODE)
def test_public_module_names_all_that_it_defines(module: str) -> None:
    names = importlib.import_module(module).__all__
    assert sorted(names) == sorted(_defined(module))


def test_every_error_can_be_caught_by_name() -> None:
    classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.OptserveError)
    }
    assert classes <= set(optserve_client.__all__)


@pytest.mark.parametrize(
    ("names", "choice"),
    [
        pytest.param(optim.__all__, optimizer_pb2.Optimizer.DESCRIPTOR, id="optim"),
        pytest.param(lr_scheduler.__all__, scheduler_pb2.Scheduler.DESCRIPTOR, id="lr_scheduler"),
        pytest.param(nn.__all__, loss_pb2.Loss.DESCRIPTOR, id="nn"),
    ],
)
def test_whole_catalogue_can_be_imported(names: list[str], choice: Descriptor) -> None:
    fields = choice.oneofs_by_name["kind"].fields
    assert {field.message_type.name for field in fields if field.message_type} <= set(names)


def _shown(module: str) -> Iterator[str]:
    """Yield the public names that a module imports from its own package, or gives itself."""
    for node in _statements(module):
        match node:
            case ast.ImportFrom(module=str(source)) if source.startswith("optserve"):
                yield from (alias.name for alias in node.names)
            case ast.AnnAssign(target=ast.Name(id=name)) if not name.startswith("_"):
                yield name
            case _:
                pass


def _defined(module: str) -> Iterator[str]:
    """Yield the public classes and functions of a module."""
    for node in _statements(module):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name


def _statements(module: str) -> list[ast.stmt]:
    path = modules("optserve_client")[module]
    return ast.parse(path.read_text(encoding="utf-8")).body
